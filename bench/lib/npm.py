"""Packages of npm, each in a folder of its own."""
import pathlib
import subprocess

BUILD = pathlib.Path(__file__).parent.parent.parent / "build/bench"


def install(name, *packages):
    """The folder in which node finds the packages."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *packages],
                   cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder
