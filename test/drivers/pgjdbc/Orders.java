// eventstore from Java, with pgjdbc.
//
// Each method below is one thing that an application does.  The connection's
// parameters come from PGHOST and the like.
//
// What JDBC makes one write: a parameter that is set as a string has the type
// varchar, so it is cast where the function wants regclass, jsonb or uuid.

import java.io.StringReader;
import java.nio.file.Path;
import java.sql.Array;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Types;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Properties;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.function.Function;
import java.util.stream.LongStream;
import org.newsclub.net.unix.AFUNIXSocketFactory;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.util.PSQLException;

public class Orders {
	static final String ORDERS = "orders_pgjdbc";
	static final String VERSION_CONFLICT = "LG001";
	static final String CONDITION_FAILED = "LG002";
	static final String CANCELLED = "57014";

	record Appended(long position, Long version, UUID id) {
	}

	record Event(long position, String stream, Long version, String type, List<String> tags, String data) {
	}

	record NewEvent(String type, String data, List<String> tags, String stream, Long expectedVersion, UUID id) {
		static NewEvent of(String type, String data, String stream) {
			return new NewEvent(type, data, List.of(), stream, null, null);
		}

		NewEvent expecting(long version) {
			return new NewEvent(type, data, tags, stream, version, id);
		}
	}

	final Connection connection;

	Orders(Connection connection) {
		this.connection = connection;
	}

	// pgjdbc speaks TCP; for a socket file it needs a socket factory.
	static Connection connect() throws SQLException {
		String host = env("PGHOST", "localhost");
		Properties properties = new Properties();
		properties.setProperty("user", env("PGUSER", System.getProperty("user.name")));
		if (System.getenv("PGPASSWORD") != null) {
			properties.setProperty("password", System.getenv("PGPASSWORD"));
		}
		if (host.startsWith("/")) {
			properties.setProperty("socketFactory", AFUNIXSocketFactory.FactoryArg.class.getName());
			properties.setProperty("socketFactoryArg",
				Path.of(host, ".s.PGSQL." + env("PGPORT", "5432")).toString());
			host = "localhost";
		}
		return DriverManager.getConnection("jdbc:postgresql://" + host + ":" + env("PGPORT", "5432") + "/"
			+ env("PGDATABASE", "postgres"), properties);
	}

	static String env(String name, String otherwise) {
		return Objects.requireNonNullElse(System.getenv(name), otherwise);
	}

	// ---- appending ------------------------------------------------------------------

	Appended append(NewEvent event) throws SQLException {
		try (PreparedStatement append = connection.prepareStatement(
			"SELECT position, version, id FROM eventstore.append(?::regclass, ?, data => ?::jsonb,"
				+ " tags => ?, stream => ?, expected_version => ?, id => ?)")) {
			append.setString(1, ORDERS);
			append.setString(2, event.type());
			append.setString(3, event.data());
			append.setArray(4, textArray(event.tags()));
			append.setString(5, event.stream());
			append.setObject(6, event.expectedVersion(), Types.BIGINT);
			append.setObject(7, event.id(), Types.OTHER);
			return appended(append).get(0);
		}
	}

	List<Appended> appendBatch(String json) throws SQLException {
		try (PreparedStatement append = connection.prepareStatement(
			"SELECT position, version, id FROM eventstore.append_batch(?::regclass, ?::jsonb)")) {
			append.setString(1, ORDERS);
			append.setString(2, json);
			return appended(append);
		}
	}

	Array textArray(List<String> texts) throws SQLException {
		return connection.createArrayOf("text", texts.toArray());
	}

	static List<Appended> appended(PreparedStatement statement) throws SQLException {
		List<Appended> rows = new ArrayList<>();
		try (ResultSet result = statement.executeQuery()) {
			while (result.next()) {
				rows.add(new Appended(result.getLong("position"), result.getObject("version", Long.class),
					result.getObject("id", UUID.class)));
			}
		}
		return rows;
	}

	/** Reads the stream, decides, appends; again when another was quicker. How often it tried. */
	int appendRetrying(String stream, Function<List<Event>, NewEvent> decide) throws SQLException {
		for (int attempt = 1; attempt < 10; attempt++) {
			List<Event> events = readStream(stream);
			try {
				append(decide.apply(events).expecting(events.size()));
				return attempt;
			} catch (SQLException e) {
				if (!e.getSQLState().equals(VERSION_CONFLICT)) {
					throw e;
				}
			}
		}
		throw new IllegalStateException("stream " + stream + " is never at rest");
	}

	// ---- reading --------------------------------------------------------------------

	/** The events of a function in FROM, whose arguments are the parameters. */
	List<Event> events(String function, Object... parameters) throws SQLException {
		try (PreparedStatement read = connection.prepareStatement("SELECT * FROM " + function)) {
			for (int i = 0; i < parameters.length; i++) {
				read.setObject(i + 1, parameters[i]);
			}
			List<Event> events = new ArrayList<>();
			try (ResultSet row = read.executeQuery()) {
				while (row.next()) {
					events.add(event(row));
				}
			}
			return events;
		}
	}

	static Event event(ResultSet row) throws SQLException {
		Array tags = row.getArray("tags");
		return new Event(row.getLong("position"), row.getString("stream"),
			row.getObject("version", Long.class), row.getString("type"),
			tags == null ? null : List.of((String[]) tags.getArray()), row.getString("data"));
	}

	List<Event> readStream(String stream) throws SQLException {
		return events("eventstore.read_stream(?::regclass, ?)", ORDERS, stream);
	}

	long head() throws SQLException {
		try (PreparedStatement head = connection.prepareStatement("SELECT eventstore.head(?::regclass)")) {
			head.setString(1, ORDERS);
			try (ResultSet row = head.executeQuery()) {
				row.next();
				return row.getLong(1);
			}
		}
	}

	/** All events up to the head of this moment, page by page. */
	List<Event> readPages(int page) throws SQLException {
		List<Event> all = new ArrayList<>();
		long head = head();
		Long after = null;
		for (;;) {
			List<Event> events = after == null
				? events("eventstore.read(?::regclass, max_count => ?)", ORDERS, page)
				: events("eventstore.read(?::regclass, after => ?, max_count => ?)", ORDERS, after, page);
			all.addAll(events);
			if (events.size() < page) {
				return all;
			}
			after = events.get(page - 1).position();
			if (after >= head) {
				return all;
			}
		}
	}

	// ---- live -----------------------------------------------------------------------

	static final int PAGE = 100;

	record Page(List<Event> events, long next) {
	}

	interface Handler {
		/** False to end. */
		boolean handle(Event event) throws SQLException;
	}

	/** The next page of events after a position, and the position to go on from. */
	Page readOn(long after) throws SQLException {
		long head = head();
		List<Event> events = events("eventstore.read(?::regclass, after => ?, max_count => ?)", ORDERS, after, PAGE);
		long last = events.isEmpty() ? after : events.get(events.size() - 1).position();
		return new Page(events, events.size() == PAGE ? last : Math.max(head, last));
	}

	/** All events after a position, and then each new one. The connection is in autocommit. */
	void follow(long after, Handler handler) throws SQLException {
		listen();
		for (;;) {
			Page page = readOn(after);
			for (Event event : page.events()) {
				if (!handler.handle(event)) {
					return;
				}
			}
			after = page.next();
			if (page.events().size() < PAGE) {
				connection.unwrap(PGConnection.class).getNotifications(0); // 0: until there is one
			}
		}
	}

	/** The head of this moment; the channel is "public.orders_pgjdbc". */
	long listen() throws SQLException {
		try (PreparedStatement listen = connection.prepareStatement("SELECT head FROM eventstore.listen(?::regclass)")) {
			listen.setString(1, ORDERS);
			try (ResultSet row = listen.executeQuery()) {
				row.next();
				return row.getLong(1);
			}
		}
	}

	/** The events after a position with a tag, waited for if need be. */
	List<Event> poll(long after, String tag) throws SQLException {
		return events("eventstore.read(?::regclass, after => ?, tags => ARRAY[?], wait => '20 s')", ORDERS, after, tag);
	}

	/** For "SELECT eventstore.wait_for(?::regclass, ?)" and "CALL eventstore.await(?::regclass, ?)". */
	long waitBy(String statement, long after) throws SQLException {
		try (PreparedStatement wait = connection.prepareStatement(statement)) {
			wait.setString(1, ORDERS);
			wait.setLong(2, after);
			try (ResultSet row = wait.executeQuery()) {
				row.next();
				return row.getLong(1);
			}
		}
	}

	// ---- subscriptions ----------------------------------------------------------------

	interface Work {
		void handle(Event event) throws Exception;
	}

	/** One batch; its place is kept in the transaction of what the work writes. How many events there were. */
	int process(String name, Work work) throws Exception {
		connection.setAutoCommit(false);
		try {
			List<Event> events = events("eventstore.poll(?, ?)", name, PAGE);
			for (Event event : events) {
				work.handle(event);
			}
			connection.commit();
			return events.size();
		} catch (Exception e) {
			connection.rollback();
			throw e;
		} finally {
			connection.setAutoCommit(true);
		}
	}

	/** One batch under a lease, for work outside of the database. What fails comes again. */
	int work(String name, String member, Work work) throws Exception {
		List<Event> events = events("eventstore.poll(?, ?, member => ?, lease => '1 min')", name, PAGE, member);
		for (Event event : events) {
			try {
				work.handle(event);
			} catch (Exception e) {
				settle("nack(?, first => ?, member => ?)", name, event, member);
				throw e;
			}
		}
		if (!events.isEmpty()) {
			settle("ack(?, up_to => ?, member => ?)", name, events.get(events.size() - 1), member);
		}
		return events.size();
	}

	void settle(String function, String name, Event event, String member) throws SQLException {
		try (PreparedStatement settle = connection.prepareStatement("SELECT eventstore." + function)) {
			settle.setString(1, name);
			settle.setLong(2, event.position());
			settle.setString(3, member);
			settle.execute();
		}
	}

	// ---- the tests: each is a name and what must hold ---------------------------------

	interface Test {
		void run(Orders orders) throws Exception;
	}

	static void check(boolean holds, Object found) {
		if (!holds) {
			throw new AssertionError(String.valueOf(found));
		}
	}

	static void equal(Object found, Object expected) {
		check(Objects.equals(found, expected), "found " + found + ", expected " + expected);
	}

	static void refused(String state, String detail, Test test, Orders orders) throws Exception {
		try {
			test.run(orders);
		} catch (PSQLException e) {
			equal(e.getSQLState(), state);
			equal(e.getServerErrorMessage().getDetail(), detail);
			return;
		}
		throw new AssertionError("no error, expected " + state);
	}

	static List<Long> versions(List<Event> events) {
		return events.stream().map(Event::version).toList();
	}

	static void appendWithNamedArguments(Orders orders) throws Exception {
		NewEvent placed = new NewEvent("order.placed", "{\"total\": 12.5}",
			List.of("customer:7", "country:de"), "order-1", 0L, UUID.randomUUID());
		Appended first = orders.append(placed);
		equal(first.version(), 1L);
		equal(first.id(), placed.id());
		equal(orders.append(placed), first);
		Event event = orders.readStream("order-1").get(0);
		equal(event.data(), "{\"total\": 12.5}");
		equal(event.tags(), List.of("customer:7", "country:de"));
	}

	static void appendBatchOfJson(Orders orders) throws Exception {
		List<String> events = new ArrayList<>();
		for (int i = 0; i < 30; i++) {
			events.add(String.format("{\"type\": \"order.placed\", \"stream\": \"batch-%d\", \"data\": {\"i\": %d,"
				+ " \"text\": \"naïve ☃\"}, \"tags\": [\"customer:8\"], \"expected_version\": %d}", i % 3, i, i / 3));
		}
		List<Appended> rows = orders.appendBatch(events.toString());
		equal(rows.size(), 30);
		for (int i = 0; i < 30; i++) {
			equal(rows.get(i).position(), rows.get(0).position() + i);
			equal(rows.get(i).version(), i / 3 + 1L);
		}
		equal(orders.readStream("batch-1").get(0).data(), "{\"i\": 1, \"text\": \"naïve ☃\"}");
	}

	static void conflictIsReadAgainAndRetried(Orders orders) throws Exception {
		orders.append(NewEvent.of("order.placed", "{}", "order-2"));
		boolean[] disturbed = {false};
		int attempts = orders.appendRetrying("order-2", events -> {
			if (!disturbed[0]) {
				disturbed[0] = true;
				try (Connection other = connect()) {
					new Orders(other).append(NewEvent.of("order.changed", "{}", "order-2"));
				} catch (SQLException e) {
					throw new IllegalStateException(e);
				}
			}
			return NewEvent.of("order.paid", "{\"after\": " + events.size() + "}", "order-2");
		});
		equal(attempts, 2);
		equal(orders.readStream("order-2").stream().map(Event::type).toList(),
			List.of("order.placed", "order.changed", "order.paid"));
	}

	static void conflictTellsTheVersions(Orders orders) throws Exception {
		refused(VERSION_CONFLICT, "Stream \"order-2\": expected version 1, actual version 3.",
			o -> o.append(NewEvent.of("order.paid", "{}", "order-2").expecting(1)), orders);
	}

	long useVoucher(long after) throws SQLException {
		try (PreparedStatement use = connection.prepareStatement(
			"SELECT position FROM eventstore.append(?::regclass, 'voucher.used', tags => ?,"
				+ " fail_if => ?::jsonb, after => ?)")) {
			use.setString(1, ORDERS);
			use.setArray(2, textArray(List.of("voucher:SPRING")));
			use.setString(3, "[{\"types\": [\"voucher.used\"], \"tags\": [\"voucher:SPRING\"]}]");
			use.setLong(4, after);
			try (ResultSet row = use.executeQuery()) {
				row.next();
				return row.getLong(1);
			}
		}
	}

	static void conditionRefusesTheSecond(Orders orders) throws Exception {
		long used = orders.useVoucher(0);
		refused(CONDITION_FAILED, "The event at position " + used + " matches.",
			o -> o.useVoucher(0), orders);
		orders.useVoucher(used);
	}

	static void pagesGiveEveryEventOnce(Orders orders) throws Exception {
		List<Event> whole = orders.events("eventstore.read(?::regclass)", ORDERS);
		check(whole.size() > 30, whole.size());
		equal(orders.readPages(7), whole);
	}

	static void streamsAreReadInBothDirections(Orders orders) throws Exception {
		equal(versions(orders.events("eventstore.read_stream(?::regclass, ?, from_version => 3, max_count => 4)",
			ORDERS, "batch-0")), List.of(3L, 4L, 5L, 6L));
		equal(versions(orders.events("eventstore.read_stream(?::regclass, ?, direction => 'backward', max_count => 2)",
			ORDERS, "batch-0")), List.of(10L, 9L));
	}

	static void peekOfAnUnknownStreamIsNull(Orders orders) throws Exception {
		equal(orders.events("eventstore.peek(?::regclass, ?)", ORDERS, "nobody").get(0).type(), null);
		equal(orders.events("eventstore.peek(?::regclass, ?)", ORDERS, "order-2").get(0).type(), "order.paid");
	}

	static void insertAppendsAndReturns(Orders orders) throws Exception {
		try (PreparedStatement insert = orders.connection.prepareStatement("INSERT INTO " + ORDERS
			+ " (type, stream, tags, data) VALUES (?, ?, ?, ?::jsonb) RETURNING position, version")) {
			insert.setString(1, "order.shipped");
			insert.setString(2, "order-2");
			insert.setArray(3, orders.textArray(List.of("customer:7")));
			insert.setString(4, "{\"with\": \"post\"}");
			try (ResultSet row = insert.executeQuery()) {
				row.next();
				equal(row.getLong("version"), 4L);
				equal(row.getLong("position"), orders.head());
			}
		}
	}

	/** From its fifth use on pgjdbc keeps a statement prepared in the server. */
	static void preparedStatementsAreUsedAgain(Orders orders) throws Exception {
		try (PreparedStatement append = orders.connection.prepareStatement(
			"SELECT version FROM eventstore.append(?::regclass, 'order.counted', ?::jsonb, stream => ?)")) {
			for (int i = 0; i < 50; i++) {
				append.setString(1, ORDERS);
				append.setString(2, "{\"i\": " + i + "}");
				append.setString(3, "counted");
				try (ResultSet row = append.executeQuery()) {
					row.next();
					equal(row.getLong(1), i + 1L);
				}
			}
		}
		equal(orders.readStream("counted").size(), 50);
	}

	static void transactionRollsBack(Orders orders) throws Exception {
		orders.connection.setAutoCommit(false);
		orders.append(NewEvent.of("order.placed", "{}", "rolled-back"));
		orders.connection.rollback();
		orders.connection.setAutoCommit(true);
		equal(orders.readStream("rolled-back"), List.of());
	}

	static void copyAppends(Orders orders) throws Exception {
		StringBuilder rows = new StringBuilder();
		for (int i = 0; i < 500; i++) {
			rows.append(String.format("order.imported\t{\"i\": %d}\t{customer:9}\timported-%d\n", i, i % 5));
		}
		equal(orders.connection.unwrap(PGConnection.class).getCopyAPI().copyIn(
			"COPY " + ORDERS + " (type, data, tags, stream) FROM STDIN", new StringReader(rows.toString())), 500L);
		List<Event> events = orders.readStream("imported-4");
		equal(events.size(), 100);
		equal(events.get(99).version(), 100L);
	}

	/** Does something, from a connection of its own, once a session sleeps in a wait. */
	static CompletableFuture<Void> meanwhile(Orders orders, Test action) throws SQLException {
		int pid = orders.connection.unwrap(PGConnection.class).getBackendPID();
		return CompletableFuture.runAsync(() -> {
			try (Connection other = connect(); PreparedStatement asleep = other.prepareStatement(
				"SELECT 1 FROM pg_stat_activity WHERE pid = ? AND wait_event_type = 'Extension'")) {
				asleep.setInt(1, pid);
				for (boolean sleeps = false; !sleeps;) {
					try (ResultSet row = asleep.executeQuery()) {
						sleeps = row.next();
					}
				}
				action.run(new Orders(other));
			} catch (Exception e) {
				throw new IllegalStateException(e);
			}
		});
	}

	static void place(Orders orders, String... tags) throws SQLException {
		orders.append(new NewEvent("order.placed", "{}", List.of(tags), null, null, null));
	}

	static void listenReturnsWhereToReadFrom(Orders orders) throws Exception {
		try (Connection connection = connect()) {
			long head = new Orders(connection).listen();
			equal(head, orders.head());
			place(orders);
			PGNotification[] notes = connection.unwrap(PGConnection.class).getNotifications(0);
			equal(notes.length, 1);
			equal(notes[0].getName(), "public." + ORDERS);
			equal(notes[0].getParameter(), String.format("{\"collection\": \"public.%s\", \"head\": %d, \"count\": 1}",
				ORDERS, head + 1));
		}
	}

	static void followerMissesAndRepeatsNothing(Orders orders) throws Exception {
		long after = orders.head();
		for (int i = 0; i < 250; i++) {
			place(orders);
		}
		List<Long> found = new ArrayList<>();
		try (Connection connection = connect()) {
			new Orders(connection).follow(after, event -> {
				found.add(event.position() - after);
				if (found.size() >= 250 && found.size() < 300) {
					place(orders);
				}
				return found.size() < 300;
			});
		}
		equal(found, LongStream.rangeClosed(1, 300).boxed().toList());
	}

	static void longPollIsWoken(Orders orders) throws Exception {
		long after = orders.head();
		CompletableFuture<Void> other = meanwhile(orders, o -> place(o, "rare:1"));
		equal(orders.poll(after, "rare:1").stream().map(Event::tags).toList(), List.of(List.of("rare:1")));
		other.get();
		for (String statement : List.of("SELECT eventstore.wait_for(?::regclass, ?)", "CALL eventstore.await(?::regclass, ?)")) {
			after++;
			other = meanwhile(orders, o -> place(o));
			equal(orders.waitBy(statement, after), after + 1);
			other.get();
		}
	}

	static void expectCancelled(Test test, Orders orders) throws Exception {
		try {
			test.run(orders);
		} catch (SQLException e) {
			equal(e.getSQLState(), CANCELLED);
			return;
		}
		throw new AssertionError("it was not ended");
	}

	static void longPollComesToItsTimeout(Orders orders) throws Exception {
		long head = orders.head();
		equal(orders.waitBy("SELECT eventstore.wait_for(?::regclass, ?, '20 ms')", head), head);
		orders.connection.setAutoCommit(false);
		try (PreparedStatement set = orders.connection.prepareStatement("SET LOCAL statement_timeout = '20 ms'")) {
			set.execute();
		}
		expectCancelled(o -> o.poll(head, "rare:2"), orders);
		orders.connection.rollback();
		orders.connection.setAutoCommit(true);
	}

	/** With Statement.cancel; setQueryTimeout calls the same when its time is over. */
	static void longPollIsCancelled(Orders orders) throws Exception {
		long head = orders.head();
		for (String sql : List.of("SELECT eventstore.wait_for(?::regclass, ?, NULL)",
			"CALL eventstore.await(?::regclass, ?, timeout => NULL)")) {
			try (PreparedStatement wait = orders.connection.prepareStatement(sql)) {
				wait.setString(1, ORDERS);
				wait.setLong(2, head);
				CompletableFuture<Void> other = meanwhile(orders, o -> wait.cancel());
				expectCancelled(o -> wait.executeQuery(), orders);
				other.get();
			}
		}
		equal(orders.head(), head);
	}

	/** A subscription to what is tagged with its name, and three events that it will get. */
	static List<Long> subscribeToBills(Orders orders, String name) throws SQLException {
		try (PreparedStatement subscribe = orders.connection.prepareStatement(
			"SELECT eventstore.subscribe(?, ?::regclass, query => ?::jsonb)")) {
			subscribe.setString(1, name);
			subscribe.setString(2, ORDERS);
			subscribe.setString(3, "[{\"tags\": [\"" + name + "\"]}]");
			subscribe.execute();
		}
		List<Long> positions = new ArrayList<>();
		for (int i = 0; i < 3; i++) {
			positions.add(orders.append(new NewEvent("order.billed", "{}", List.of(name), null, null, null)).position());
		}
		return positions;
	}

	static void expectFailure(String message, Test test, Orders orders) {
		try {
			test.run(orders);
		} catch (Exception e) {
			equal(e.getMessage(), message);
			return;
		}
		throw new AssertionError("it did not fail");
	}

	static void subscriptionMovesWithTheTransaction(Orders orders) throws Exception {
		String name = ORDERS + "_bills";
		List<Long> expected = new ArrayList<>(subscribeToBills(orders, name));
		expected.addAll(expected);
		List<Long> handled = new ArrayList<>();
		expectFailure("the application gave up", o -> o.process(name, event -> {
			handled.add(event.position());
			if (handled.size() == 3) {
				throw new IllegalStateException("the application gave up");
			}
		}), orders);
		equal(orders.process(name, event -> handled.add(event.position())), 3);
		equal(orders.process(name, event -> handled.add(event.position())), 0);
		equal(handled, expected);
	}

	static void subscriptionLeasesWork(Orders orders) throws Exception {
		String name = ORDERS + "_mails";
		List<Long> positions = subscribeToBills(orders, name);
		List<Long> handled = new ArrayList<>();
		expectFailure("the mail server is away", o -> o.work(name, "host-1", event -> {
			if (handled.size() == 1) {
				throw new IllegalStateException("the mail server is away");
			}
			handled.add(event.position());
		}), orders);
		equal(orders.work(name, "host-2", event -> handled.add(event.position())), 2);
		equal(orders.work(name, "host-1", event -> handled.add(event.position())), 0);
		equal(handled, positions);
	}

	static final Map<String, Test> TESTS = new LinkedHashMap<>();
	static {
		TESTS.put("append with named arguments", Orders::appendWithNamedArguments);
		TESTS.put("append batch of json", Orders::appendBatchOfJson);
		TESTS.put("conflict is read again and retried", Orders::conflictIsReadAgainAndRetried);
		TESTS.put("conflict tells the versions", Orders::conflictTellsTheVersions);
		TESTS.put("condition refuses the second", Orders::conditionRefusesTheSecond);
		TESTS.put("pages give every event once", Orders::pagesGiveEveryEventOnce);
		TESTS.put("streams are read in both directions", Orders::streamsAreReadInBothDirections);
		TESTS.put("peek of an unknown stream is null", Orders::peekOfAnUnknownStreamIsNull);
		TESTS.put("insert appends and returns", Orders::insertAppendsAndReturns);
		TESTS.put("prepared statements are used again", Orders::preparedStatementsAreUsedAgain);
		TESTS.put("transaction rolls back", Orders::transactionRollsBack);
		TESTS.put("copy appends", Orders::copyAppends);
		TESTS.put("listen returns where to read from", Orders::listenReturnsWhereToReadFrom);
		TESTS.put("follower misses and repeats nothing", Orders::followerMissesAndRepeatsNothing);
		TESTS.put("long poll is woken", Orders::longPollIsWoken);
		TESTS.put("long poll comes to its timeout", Orders::longPollComesToItsTimeout);
		TESTS.put("long poll is cancelled", Orders::longPollIsCancelled);
		TESTS.put("subscription moves with the transaction", Orders::subscriptionMovesWithTheTransaction);
		TESTS.put("subscription leases work", Orders::subscriptionLeasesWork);
	}

	static void call(Connection connection, String function) throws SQLException {
		try (PreparedStatement call = connection.prepareStatement("SELECT eventstore." + function)) {
			call.setString(1, ORDERS);
			call.execute();
		}
	}

	public static void main(String[] args) throws SQLException {
		int failed = 0;
		System.out.println("1.." + TESTS.size());
		try (Connection connection = connect()) {
			call(connection, "create_collection(?)");
			for (Map.Entry<String, Test> test : TESTS.entrySet()) {
				try {
					test.getValue().run(new Orders(connection));
					System.out.println("ok " + test.getKey());
				} catch (Exception | AssertionError e) {
					failed++;
					System.out.println("not ok " + test.getKey() + "\n" + e);
				}
			}
			call(connection, "drop_collection(?::regclass)");
		}
		System.exit(failed > 0 ? 1 : 0);
	}
}
