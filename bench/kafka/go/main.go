// What one writes in Go to keep the latest value of each key of a topic in
// PostgreSQL, exactly once: franz-go and pgx, for each partition a consumer and a
// connection of its own, ten thousand records a transaction, merged by key,
// copied into a temporary table and from there upserted, the offset stored with
// them.
//
//	main ADDRESS TOPIC PARTITIONS TABLE
//
// TABLE (key text primary key, value jsonb) and TABLE_offsets (part int primary
// key, next bigint) exist.  PGHOST and its like say where.  It never ends.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"
)

const batchSize = 10_000

// What is there is written after so long, also when it is less than a batch.
const patience = 100 * time.Millisecond

type writer struct {
	conn      *pgx.Conn
	partition int32
	table     string
	staged    string
}

func (w *writer) prepare(ctx context.Context) (next int64, err error) {
	w.staged = fmt.Sprintf("staged_%d", w.partition)
	if _, err = w.conn.Exec(ctx, "CREATE TEMPORARY TABLE "+w.staged+
		" (key text, value jsonb) ON COMMIT DELETE ROWS"); err != nil {
		return 0, err
	}
	err = w.conn.QueryRow(ctx, "INSERT INTO "+w.table+"_offsets AS o VALUES ($1, 0)"+
		" ON CONFLICT (part) DO UPDATE SET next = o.next RETURNING next", w.partition).Scan(&next)
	return next, err
}

// The last record of each key: values to be stored, and keys to be deleted.
func merge(batch []*kgo.Record) (rows [][]any, gone []string) {
	last := make(map[string]*kgo.Record, len(batch))
	for _, record := range batch {
		last[string(record.Key)] = record
	}
	for key, record := range last {
		if record.Value == nil {
			gone = append(gone, key)
		} else {
			rows = append(rows, []any{key, record.Value})
		}
	}
	return rows, gone
}

func (w *writer) write(ctx context.Context, batch []*kgo.Record) error {
	rows, gone := merge(batch)
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx)
	if _, err := tx.CopyFrom(ctx, pgx.Identifier{w.staged}, []string{"key", "value"}, pgx.CopyFromRows(rows)); err != nil {
		return err
	}
	statements := &pgx.Batch{}
	statements.Queue("INSERT INTO " + w.table + " SELECT key, value FROM " + w.staged +
		" ON CONFLICT (key) DO UPDATE SET value = excluded.value")
	if len(gone) > 0 {
		statements.Queue("DELETE FROM "+w.table+" WHERE key = ANY($1)", gone)
	}
	statements.Queue("UPDATE "+w.table+"_offsets SET next = $2 WHERE part = $1",
		w.partition, batch[len(batch)-1].Offset+1)
	if err := tx.SendBatch(ctx, statements).Close(); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// A whole batch, or what came within our patience.
func collect(ctx context.Context, client *kgo.Client) ([]*kgo.Record, error) {
	var batch []*kgo.Record
	limit, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for len(batch) < batchSize {
		fetches := client.PollRecords(limit, batchSize-len(batch))
		if limit.Err() != nil && fetches.NumRecords() == 0 {
			break
		}
		if err := fetches.Err(); err != nil && limit.Err() == nil {
			return nil, err
		}
		batch = append(batch, fetches.Records()...)
	}
	return batch, nil
}

func follow(ctx context.Context, address, topic, table string, partition int32) error {
	conn, err := pgx.Connect(ctx, "")
	if err != nil {
		return err
	}
	w := &writer{conn: conn, partition: partition, table: table}
	next, err := w.prepare(ctx)
	if err != nil {
		return err
	}
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(address, ",")...),
		kgo.FetchMaxPartitionBytes(4<<20),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: {partition: kgo.NewOffset().At(next)}}))
	if err != nil {
		return err
	}
	for {
		batch, err := collect(ctx, client)
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			continue
		}
		if err := w.write(ctx, batch); err != nil {
			return err
		}
	}
}

func main() {
	if len(os.Args) != 5 {
		log.Fatal("usage: main ADDRESS TOPIC PARTITIONS TABLE")
	}
	partitions, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	failed := make(chan error)
	for i := 0; i < partitions; i++ {
		go func(partition int32) {
			failed <- follow(context.Background(), os.Args[1], os.Args[2], os.Args[4], partition)
		}(int32(i))
	}
	log.Fatal(<-failed)
}
