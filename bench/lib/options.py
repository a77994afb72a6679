"""What bench/run was asked for."""
import os

ROUNDS = int(os.environ["BENCH_ROUNDS"])
SECONDS = int(os.environ["BENCH_SECONDS"])
CLIENTS = [int(n) for n in os.environ["BENCH_CLIENTS"].split()]
LARGE = os.environ["BENCH_LARGE"] == "1"
QUICK = os.environ["BENCH_QUICK"] == "1"
FLUSH_DELAY_US = int(os.environ["BENCH_FLUSH_DELAY"])
COMMAND = os.environ["BENCH_COMMAND"].strip()
