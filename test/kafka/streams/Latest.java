// The latest value of each key of a topic, as Kafka Streams keeps it: a KTable in
// RocksDB, with its changelog topic, exactly once.
//
//   Latest ADDRESS TOPIC THREADS FOLDER KEYS SUM KEY=NUMBER...
//
// Prints "first" when its store shows a key, and "all" when it shows KEYS keys
// whose numbers (the first of each value) add up to SUM; that is asked for once
// each KEY given has its NUMBER.  Then it waits to be ended.
//
// It is a new application each time, whose store is empty, unless the environment's
// APPLICATION_ID names one: that restores its store where FOLDER does not have it.

import java.util.Arrays;
import java.util.Properties;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StoreQueryParameters;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.errors.InvalidStateStoreException;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.QueryableStoreTypes;
import org.apache.kafka.streams.state.ReadOnlyKeyValueStore;

public class Latest {
	interface Condition {
		boolean holds();
	}

	static Properties settings(String address, String topic, String threads, String folder) {
		Properties settings = new Properties();
		settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, address);
		settings.put(StreamsConfig.APPLICATION_ID_CONFIG,
			System.getenv().getOrDefault("APPLICATION_ID", topic + "-" + System.nanoTime()));
		settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, threads);
		settings.put(StreamsConfig.STATE_DIR_CONFIG, folder);
		settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
		settings.put(StreamsConfig.consumerPrefix("auto.offset.reset"), "earliest");
		settings.put(StreamsConfig.consumerPrefix("max.poll.records"), "10000");
		return settings;
	}

	static long number(String value) {
		return Long.parseLong(value.substring(value.indexOf(": ") + 2, value.indexOf(',')));
	}

	static boolean shows(ReadOnlyKeyValueStore<String, String> store, String last) {
		int end = last.indexOf('=');
		String value = store.get(last.substring(0, end));
		return value != null && number(value) == Long.parseLong(last.substring(end + 1));
	}

	static boolean isAll(ReadOnlyKeyValueStore<String, String> store, long keys, long sum) {
		try (var entries = store.all()) {
			while (entries.hasNext()) {
				keys--;
				sum -= number(entries.next().value);
			}
		}
		return keys == 0 && sum == 0;
	}

	static boolean isAny(ReadOnlyKeyValueStore<String, String> store) {
		try (var entries = store.all()) {
			return entries.hasNext();
		}
	}

	// Until it holds; a store that is being opened or has moved is asked again.
	static void await(Condition condition) throws InterruptedException {
		while (true) {
			try {
				if (condition.holds()) {
					return;
				}
			} catch (InvalidStateStoreException e) {
				// Not yet.
			}
			Thread.sleep(10);
		}
	}

	public static void main(String[] args) throws Exception {
		StreamsBuilder builder = new StreamsBuilder();
		builder.table(args[1], Materialized.<String, String, KeyValueStore<Bytes, byte[]>>as("kept")
			.withKeySerde(Serdes.String()).withValueSerde(Serdes.String()));
		KafkaStreams streams = new KafkaStreams(builder.build(), settings(args[0], args[1], args[2], args[3]));
		Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
		streams.start();
		await(() -> streams.state() == KafkaStreams.State.RUNNING);

		ReadOnlyKeyValueStore<String, String> store = streams.store(
			StoreQueryParameters.fromNameAndType("kept", QueryableStoreTypes.<String, String>keyValueStore()));
		await(() -> isAny(store));
		System.out.println("first");
		for (String last : Arrays.copyOfRange(args, 6, args.length)) {
			await(() -> shows(store, last));
		}
		await(() -> isAll(store, Long.parseLong(args[4]), Long.parseLong(args[5])));
		System.out.println("all");
		Thread.currentThread().join();
	}
}
