// eventstore from Go, with pgx.
//
// Each function below is one thing that an application does.  The connection's
// parameters come from PGHOST and the like.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

const (
	orders          = "orders_pgx"
	versionConflict = "LG001"
	conditionFailed = "LG002"
	cancelled       = "57014"
)

// Event has the columns that these examples look at.
type Event struct {
	Position int64          `db:"position"`
	Stream   *string        `db:"stream"`
	Version  *int64         `db:"version"`
	Type     string         `db:"type"`
	Tags     []string       `db:"tags"`
	Data     map[string]any `db:"data"`
}

const eventColumns = "position, stream, version, type, tags, data"

// Appended is what an append returns.
type Appended struct {
	Position int64
	Version  *int64
	ID       pgtype.UUID
}

func appendEvent(ctx context.Context, conn *pgx.Conn, eventType string, data any, named pgx.NamedArgs) (Appended, error) {
	args := pgx.NamedArgs{"collection": orders, "type": eventType, "data": data, "tags": []string{},
		"stream": nil, "expected_version": nil, "id": nil}
	for name, value := range named {
		args[name] = value
	}
	rows, _ := conn.Query(ctx, `SELECT position, version, id FROM eventstore.append(@collection, @type,
		data => @data, tags => @tags, stream => @stream, expected_version => @expected_version,
		id => @id)`, args)
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[Appended])
}

func appendBatch(ctx context.Context, conn *pgx.Conn, events []map[string]any) ([]Appended, error) {
	rows, _ := conn.Query(ctx, "SELECT position, version, id FROM eventstore.append_batch($1, $2)", orders, events)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Appended])
}

func collectEvents(ctx context.Context, conn *pgx.Conn, from string, args ...any) ([]Event, error) {
	rows, _ := conn.Query(ctx, "SELECT "+eventColumns+" FROM "+from, args...)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Event])
}

func readStream(ctx context.Context, conn *pgx.Conn, stream string) ([]Event, error) {
	return collectEvents(ctx, conn, "eventstore.read_stream($1, $2)", orders, stream)
}

// is tells whether PostgreSQL raised an error with this SQLSTATE.
func is(err error, sqlstate string) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == sqlstate
}

func detail(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Detail
	}
	return ""
}

// appendRetrying reads the stream, decides, appends; again when another was
// quicker.  It returns how often it tried.
func appendRetrying(ctx context.Context, conn *pgx.Conn, stream string, decide func([]Event) (string, any)) (int, error) {
	for attempt := 1; attempt < 10; attempt++ {
		events, err := readStream(ctx, conn, stream)
		if err != nil {
			return attempt, err
		}
		eventType, data := decide(events)
		_, err = appendEvent(ctx, conn, eventType, data,
			pgx.NamedArgs{"stream": stream, "expected_version": len(events)})
		if err == nil || !is(err, versionConflict) {
			return attempt, err
		}
	}
	return 0, fmt.Errorf("stream %s is never at rest", stream)
}

// readPages gives all events up to the head of this moment, page by page.
func readPages(ctx context.Context, conn *pgx.Conn, page int, handle func(Event)) error {
	var head int64
	if err := conn.QueryRow(ctx, "SELECT eventstore.head($1)", orders).Scan(&head); err != nil {
		return err
	}
	var after *int64
	for {
		events, err := collectEvents(ctx, conn, "eventstore.read($1, after => $2, max_count => $3)",
			orders, after, page)
		if err != nil {
			return err
		}
		for _, event := range events {
			handle(event)
		}
		if len(events) < page {
			return nil
		}
		after = &events[len(events)-1].Position
		if *after >= head {
			return nil
		}
	}
}

// ---- live --------------------------------------------------------------------------

const page = 100

func headOf(ctx context.Context, conn *pgx.Conn) (head int64, err error) {
	err = conn.QueryRow(ctx, "SELECT eventstore.head($1)", orders).Scan(&head)
	return head, err
}

// readOn gives the next page of events after a position, and the position to go on from.
func readOn(ctx context.Context, conn *pgx.Conn, after int64) ([]Event, int64, error) {
	head, err := headOf(ctx, conn)
	if err != nil {
		return nil, after, err
	}
	events, err := collectEvents(ctx, conn, "eventstore.read($1, after => $2, max_count => $3)",
		orders, after, page)
	if err != nil {
		return nil, after, err
	}
	if len(events) > 0 {
		after = events[len(events)-1].Position
	}
	if len(events) < page && head > after {
		after = head
	}
	return events, after, nil
}

// follow handles all events after a position, and then each new one, until an
// error comes or ctx ends.  The connection is for this alone.
func follow(ctx context.Context, conn *pgx.Conn, after int64, handle func(Event)) error {
	if _, err := conn.Exec(ctx, "SELECT * FROM eventstore.listen($1)", orders); err != nil {
		return err
	}
	for {
		events, next, err := readOn(ctx, conn, after)
		if err != nil {
			return err
		}
		for _, event := range events {
			handle(event)
		}
		after = next
		if len(events) == page {
			continue
		}
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
	}
}

// poll gives the events after a position with all of the tags, waited for if need
// be.  How long is said to the server: when ctx ends, pgx closes the connection.
func poll(ctx context.Context, conn *pgx.Conn, after int64, tags ...string) ([]Event, error) {
	return collectEvents(ctx, conn, "eventstore.read($1, after => $2, tags => $3, wait => '20 s')",
		orders, after, tags)
}

// ---- subscriptions -----------------------------------------------------------------

// process handles one batch; its place is kept in the transaction of what handle
// writes.  It returns how many events there were.
func process(ctx context.Context, conn *pgx.Conn, name string, handle func(pgx.Tx, Event) error) (n int, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		events, err := collectEvents(ctx, tx.Conn(), "eventstore.poll($1, $2)", name, page)
		if err != nil {
			return err
		}
		for _, event := range events {
			if err := handle(tx, event); err != nil {
				return err
			}
		}
		n = len(events)
		return nil
	})
	return n, err
}

// work handles one batch under a lease, for work outside of the database.  What
// fails comes again.
func work(ctx context.Context, conn *pgx.Conn, name, member string, handle func(Event) error) (int, error) {
	events, err := collectEvents(ctx, conn, "eventstore.poll($1, $2, member => $3, lease => '1 min')",
		name, page, member)
	if err != nil || len(events) == 0 {
		return 0, err
	}
	for _, event := range events {
		if failed := handle(event); failed != nil {
			if _, err := conn.Exec(ctx, "SELECT eventstore.nack($1, first => $2, member => $3)",
				name, event.Position, member); err != nil {
				return 0, err
			}
			return 0, failed
		}
	}
	_, err = conn.Exec(ctx, "SELECT eventstore.ack($1, up_to => $2, member => $3)",
		name, events[len(events)-1].Position, member)
	return len(events), err
}

// ---- the tests: each is a name and what must hold ----------------------------------

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func equal(got, want any) {
	if !reflect.DeepEqual(got, want) {
		panic(fmt.Errorf("got %v, want %v", got, want))
	}
}

func versions(events []Event) []int64 {
	found := []int64{}
	for _, event := range events {
		found = append(found, *event.Version)
	}
	return found
}

func appendWithNamedArguments(ctx context.Context, conn *pgx.Conn) {
	args := pgx.NamedArgs{"tags": []string{"customer:7", "country:de"}, "stream": "order-1",
		"expected_version": 0, "id": "0196b2a4-0000-7000-8000-000000000001"}
	data := map[string]any{"total": 12.5}
	first, err := appendEvent(ctx, conn, "order.placed", data, args)
	check(err)
	equal(*first.Version, int64(1))
	again, err := appendEvent(ctx, conn, "order.placed", data, args)
	check(err)
	equal(again, first)
	events, err := readStream(ctx, conn, "order-1")
	check(err)
	equal(events[0].Data, data)
	equal(events[0].Tags, []string{"customer:7", "country:de"})
}

func appendBatchOfJSON(ctx context.Context, conn *pgx.Conn) {
	var events []map[string]any
	for i := 0; i < 30; i++ {
		events = append(events, map[string]any{"type": "order.placed", "stream": fmt.Sprintf("batch-%d", i%3),
			"data": map[string]any{"i": i, "text": "naïve ☃"}, "tags": []string{"customer:8"},
			"expected_version": i / 3})
	}
	rows, err := appendBatch(ctx, conn, events)
	check(err)
	equal(len(rows), 30)
	for i, row := range rows {
		equal(row.Position, rows[0].Position+int64(i))
		equal(*row.Version, int64(i/3+1))
	}
	read, err := readStream(ctx, conn, "batch-1")
	check(err)
	equal(read[0].Data, map[string]any{"i": 1.0, "text": "naïve ☃"})
}

func conflictIsReadAgainAndRetried(ctx context.Context, conn *pgx.Conn) {
	_, err := appendEvent(ctx, conn, "order.placed", nil, pgx.NamedArgs{"stream": "order-2"})
	check(err)
	disturbed := false
	attempts, err := appendRetrying(ctx, conn, "order-2", func(events []Event) (string, any) {
		if !disturbed {
			disturbed = true
			other, err := pgx.Connect(ctx, "")
			check(err)
			_, err = appendEvent(ctx, other, "order.changed", nil, pgx.NamedArgs{"stream": "order-2"})
			check(err)
			check(other.Close(ctx))
		}
		return "order.paid", map[string]any{"after": len(events)}
	})
	check(err)
	equal(attempts, 2)
	events, err := readStream(ctx, conn, "order-2")
	check(err)
	equal([]string{events[0].Type, events[1].Type, events[2].Type},
		[]string{"order.placed", "order.changed", "order.paid"})
}

func conflictTellsTheVersions(ctx context.Context, conn *pgx.Conn) {
	_, err := appendEvent(ctx, conn, "order.paid", nil,
		pgx.NamedArgs{"stream": "order-2", "expected_version": 1})
	equal(is(err, versionConflict), true)
	equal(detail(err), `Stream "order-2": expected version 1, actual version 3.`)
}

func conditionRefusesTheSecond(ctx context.Context, conn *pgx.Conn) {
	query := []map[string]any{{"types": []string{"voucher.used"}, "tags": []string{"voucher:SPRING"}}}
	use := func(after int64) (position int64, err error) {
		err = conn.QueryRow(ctx, `SELECT position FROM eventstore.append($1, 'voucher.used', tags => $2,
			fail_if => $3, after => $4)`, orders, []string{"voucher:SPRING"}, query, after).Scan(&position)
		return position, err
	}
	used, err := use(0)
	check(err)
	_, err = use(0)
	equal(is(err, conditionFailed), true)
	equal(detail(err), fmt.Sprintf("The event at position %d matches.", used))
	_, err = use(used)
	check(err)
}

func pagesGiveEveryEventOnce(ctx context.Context, conn *pgx.Conn) {
	whole, err := collectEvents(ctx, conn, "eventstore.read($1)", orders)
	check(err)
	var paged []Event
	check(readPages(ctx, conn, 7, func(event Event) { paged = append(paged, event) }))
	equal(len(whole) > 30, true)
	equal(paged, whole)
}

func streamsAreReadInBothDirections(ctx context.Context, conn *pgx.Conn) {
	forward, err := collectEvents(ctx, conn,
		"eventstore.read_stream($1, $2, from_version => 3, max_count => 4)", orders, "batch-0")
	check(err)
	equal(versions(forward), []int64{3, 4, 5, 6})
	backward, err := collectEvents(ctx, conn,
		"eventstore.read_stream($1, $2, direction => 'backward', max_count => 2)", orders, "batch-0")
	check(err)
	equal(versions(backward), []int64{10, 9})
}

func peekOfAnUnknownStreamIsNull(ctx context.Context, conn *pgx.Conn) {
	peek := func(stream string) (eventType *string) {
		check(conn.QueryRow(ctx, "SELECT type FROM eventstore.peek($1, $2)", orders, stream).Scan(&eventType))
		return eventType
	}
	equal(peek("nobody") == nil, true)
	equal(*peek("order-2"), "order.paid")
}

func insertAppendsAndReturns(ctx context.Context, conn *pgx.Conn) {
	var position, version, head int64
	check(conn.QueryRow(ctx, "INSERT INTO "+orders+` (type, stream, tags, data) VALUES ($1, $2, $3, $4)
		RETURNING position, version`, "order.shipped", "order-2", []string{"customer:7"},
		map[string]any{"with": "post"}).Scan(&position, &version))
	equal(version, int64(4))
	check(conn.QueryRow(ctx, "SELECT eventstore.head($1)", orders).Scan(&head))
	equal(head, position)
}

// pgx prepares every statement that it sees and keeps it; here by name as well.
func preparedStatementsAreUsedAgain(ctx context.Context, conn *pgx.Conn) {
	_, err := conn.Prepare(ctx, "append_counted",
		"SELECT version FROM eventstore.append($1, 'order.counted', $2, stream => $3)")
	check(err)
	for i := 0; i < 50; i++ {
		var version int64
		var data map[string]any
		check(conn.QueryRow(ctx, "append_counted", orders, map[string]any{"i": i}, "counted").Scan(&version))
		equal(version, int64(i+1))
		check(conn.QueryRow(ctx, "SELECT data FROM eventstore.read_stream($1, $2, from_version => $3)",
			orders, "counted", i+1).Scan(&data))
		equal(data, map[string]any{"i": float64(i)})
	}
}

func transactionRollsBack(ctx context.Context, conn *pgx.Conn) {
	tx, err := conn.Begin(ctx)
	check(err)
	_, err = appendEvent(ctx, tx.Conn(), "order.placed", nil, pgx.NamedArgs{"stream": "rolled-back"})
	check(err)
	check(tx.Rollback(ctx))
	events, err := readStream(ctx, conn, "rolled-back")
	check(err)
	equal(len(events), 0)
}

func copyAppends(ctx context.Context, conn *pgx.Conn) {
	n, err := conn.CopyFrom(ctx, pgx.Identifier{orders}, []string{"type", "data", "tags", "stream"},
		pgx.CopyFromSlice(500, func(i int) ([]any, error) {
			return []any{"order.imported", map[string]any{"i": i}, []string{"customer:9"},
				fmt.Sprintf("imported-%d", i%5)}, nil
		}))
	check(err)
	equal(n, int64(500))
	events, err := readStream(ctx, conn, "imported-4")
	check(err)
	equal(len(events), 100)
	for i, version := range versions(events) {
		equal(version, int64(i+1))
	}
}

// meanwhile does something, from a connection of its own, once the session of conn
// sleeps in a wait; what it returns is called to wait for its end.
func meanwhile(ctx context.Context, conn *pgx.Conn, action func(other *pgx.Conn)) (join func()) {
	pid := conn.PgConn().PID()
	ended := make(chan any)
	go func() {
		defer func() { ended <- recover() }()
		other, err := pgx.Connect(ctx, "")
		check(err)
		for asleep := false; !asleep; {
			check(other.QueryRow(ctx, "SELECT coalesce(wait_event_type, '') = 'Extension' FROM pg_stat_activity WHERE pid = $1", pid).Scan(&asleep))
		}
		action(other)
		check(other.Close(ctx))
	}()
	return func() {
		if reason := <-ended; reason != nil {
			panic(reason)
		}
	}
}

func place(ctx context.Context, tags ...string) func(*pgx.Conn) {
	return func(conn *pgx.Conn) {
		_, err := appendEvent(ctx, conn, "order.placed", nil, pgx.NamedArgs{"tags": append([]string{}, tags...)})
		check(err)
	}
}

func listenReturnsWhereToReadFrom(ctx context.Context, conn *pgx.Conn) {
	listening, err := pgx.Connect(ctx, "")
	check(err)
	var channel string
	var head int64
	check(listening.QueryRow(ctx, "SELECT * FROM eventstore.listen($1)", orders).Scan(&channel, &head))
	now, err := headOf(ctx, conn)
	check(err)
	equal(head, now)
	place(ctx)(conn)
	note, err := listening.WaitForNotification(ctx)
	check(err)
	equal(note.Channel, channel)
	equal(note.Payload, fmt.Sprintf(`{"collection": "public.%s", "head": %d, "count": 1}`, orders, head+1))
	check(listening.Close(ctx))
}

func followerMissesAndRepeatsNothing(ctx context.Context, conn *pgx.Conn) {
	after, err := headOf(ctx, conn)
	check(err)
	for i := 0; i < 250; i++ {
		place(ctx)(conn)
	}
	listening, err := pgx.Connect(ctx, "")
	check(err)
	following, stop := context.WithCancel(ctx)
	defer stop()
	found := make(chan int64)
	go follow(following, listening, after, func(event Event) { found <- event.Position })
	for i := 0; i < 300; i++ {
		if i >= 250 {
			place(ctx)(conn)
		}
		equal(<-found, after+int64(i)+1)
	}
}

func longPollIsWoken(ctx context.Context, conn *pgx.Conn) {
	after, err := headOf(ctx, conn)
	check(err)
	join := meanwhile(ctx, conn, place(ctx, "rare:1"))
	events, err := poll(ctx, conn, after, "rare:1")
	check(err)
	join()
	equal(len(events), 1)
	equal(events[0].Tags, []string{"rare:1"})
	for i, statement := range []string{"SELECT eventstore.wait_for($1, $2)", "CALL eventstore.await($1, $2)"} {
		var head int64
		join := meanwhile(ctx, conn, place(ctx))
		check(conn.QueryRow(ctx, statement, orders, after+int64(i)+1).Scan(&head))
		join()
		equal(head, after+int64(i)+2)
	}
}

func longPollComesToItsTimeout(ctx context.Context, conn *pgx.Conn) {
	head, err := headOf(ctx, conn)
	check(err)
	var waited int64
	check(conn.QueryRow(ctx, "SELECT eventstore.wait_for($1, $2, '20 ms')", orders, head).Scan(&waited))
	equal(waited, head)
	tx, err := conn.Begin(ctx)
	check(err)
	_, err = tx.Exec(ctx, "SET LOCAL statement_timeout = '20 ms'")
	check(err)
	_, err = poll(ctx, conn, head)
	equal(is(err, cancelled), true)
	check(tx.Rollback(ctx))
}

func longPollIsCancelled(ctx context.Context, conn *pgx.Conn) {
	for _, statement := range []string{"SELECT eventstore.wait_for($1, $2, NULL)",
		"CALL eventstore.await($1, $2, timeout => NULL)"} {
		head, err := headOf(ctx, conn)
		check(err)
		join := meanwhile(ctx, conn, func(*pgx.Conn) { check(conn.PgConn().CancelRequest(ctx)) })
		_, err = conn.Exec(ctx, statement, orders, head)
		equal(is(err, cancelled), true)
		join()
	}
	_, err := headOf(ctx, conn)
	check(err)
}

// subscribeToBills makes a subscription to what is tagged with its name, and three
// events that it will get.
func subscribeToBills(ctx context.Context, conn *pgx.Conn, name string) (positions []int64) {
	_, err := conn.Exec(ctx, "SELECT eventstore.subscribe($1, $2, query => $3)", name, orders,
		[]map[string]any{{"tags": []string{name}}})
	check(err)
	for i := 0; i < 3; i++ {
		appended, err := appendEvent(ctx, conn, "order.billed", nil, pgx.NamedArgs{"tags": []string{name}})
		check(err)
		positions = append(positions, appended.Position)
	}
	return positions
}

func subscriptionMovesWithTheTransaction(ctx context.Context, conn *pgx.Conn) {
	name := orders + "_bills"
	positions := subscribeToBills(ctx, conn, name)
	var handled []int64
	gaveUp := errors.New("the application gave up")
	_, err := process(ctx, conn, name, func(_ pgx.Tx, event Event) error {
		handled = append(handled, event.Position)
		if len(handled) == 3 {
			return gaveUp
		}
		return nil
	})
	equal(err, gaveUp)
	for _, expected := range []int{3, 0} {
		n, err := process(ctx, conn, name, func(_ pgx.Tx, event Event) error {
			handled = append(handled, event.Position)
			return nil
		})
		check(err)
		equal(n, expected)
	}
	equal(handled, append(positions, positions...))
}

func subscriptionLeasesWork(ctx context.Context, conn *pgx.Conn) {
	name := orders + "_mails"
	positions := subscribeToBills(ctx, conn, name)
	var handled []int64
	away := errors.New("the mail server is away")
	_, err := work(ctx, conn, name, "host-1", func(event Event) error {
		if len(handled) == 1 {
			return away
		}
		handled = append(handled, event.Position)
		return nil
	})
	equal(err, away)
	for _, expected := range []int{2, 0} {
		n, err := work(ctx, conn, name, "host-2", func(event Event) error {
			handled = append(handled, event.Position)
			return nil
		})
		check(err)
		equal(n, expected)
	}
	equal(handled, positions)
}

var tests = []struct {
	name string
	run  func(context.Context, *pgx.Conn)
}{
	{"append with named arguments", appendWithNamedArguments},
	{"append batch of json", appendBatchOfJSON},
	{"conflict is read again and retried", conflictIsReadAgainAndRetried},
	{"conflict tells the versions", conflictTellsTheVersions},
	{"condition refuses the second", conditionRefusesTheSecond},
	{"pages give every event once", pagesGiveEveryEventOnce},
	{"streams are read in both directions", streamsAreReadInBothDirections},
	{"peek of an unknown stream is null", peekOfAnUnknownStreamIsNull},
	{"insert appends and returns", insertAppendsAndReturns},
	{"prepared statements are used again", preparedStatementsAreUsedAgain},
	{"transaction rolls back", transactionRollsBack},
	{"copy appends", copyAppends},
	{"listen returns where to read from", listenReturnsWhereToReadFrom},
	{"follower misses and repeats nothing", followerMissesAndRepeatsNothing},
	{"long poll is woken", longPollIsWoken},
	{"long poll comes to its timeout", longPollComesToItsTimeout},
	{"long poll is cancelled", longPollIsCancelled},
	{"subscription moves with the transaction", subscriptionMovesWithTheTransaction},
	{"subscription leases work", subscriptionLeasesWork},
}

// failure runs a test and returns what it panicked with; nil when it passes.
func failure(ctx context.Context, conn *pgx.Conn, test func(context.Context, *pgx.Conn)) (reason any) {
	defer func() { reason = recover() }()
	test(ctx, conn)
	return nil
}

func main() {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, "")
	check(err)
	_, err = conn.Exec(ctx, "SELECT eventstore.create_collection($1)", orders)
	check(err)
	fmt.Printf("1..%d\n", len(tests))
	failed := 0
	for _, test := range tests {
		if reason := failure(ctx, conn, test.run); reason != nil {
			failed++
			fmt.Printf("not ok %s\n%v\n", test.name, reason)
		} else {
			fmt.Printf("ok %s\n", test.name)
		}
	}
	_, err = conn.Exec(ctx, "SELECT eventstore.drop_collection($1)", orders)
	check(err)
	check(conn.Close(ctx))
	if failed > 0 {
		os.Exit(1)
	}
}
