//! eventstore from Rust, with tokio-postgres.
//!
//! Each function below is one thing that an application does.  The connection's
//! parameters come from PGHOST and the like.
//!
//! tokio-postgres sends a parameter as the type that the server asks for, and knows
//! none for regclass: hence $1::text::regclass.

use std::env;
use std::error::Error as StdError;
use std::future::{poll_fn, Future};

use futures_util::{pin_mut, SinkExt};
use serde_json::{json, Value};
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver};
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, Config, Error, GenericClient, NoTls, Notification, Row};
use uuid::Uuid;

const ORDERS: &str = "orders_tokio";
const VERSION_CONFLICT: &str = "LG001";
const CONDITION_FAILED: &str = "LG002";
const CANCELLED: &str = "57014";

type Notes = UnboundedReceiver<Notification>;

#[derive(Clone, Debug, PartialEq)]
struct Appended {
    position: i64,
    version: Option<i64>,
    id: Uuid,
}

impl From<Row> for Appended {
    fn from(row: Row) -> Self {
        Appended { position: row.get("position"), version: row.get("version"), id: row.get("id") }
    }
}

/// The columns that these examples look at.
#[derive(Clone, Debug, PartialEq)]
struct Event {
    position: i64,
    version: Option<i64>,
    event_type: String,
    tags: Vec<String>,
    data: Option<Value>,
}

impl From<Row> for Event {
    fn from(row: Row) -> Self {
        Event {
            position: row.get("position"),
            version: row.get("version"),
            event_type: row.get("type"),
            tags: row.get("tags"),
            data: row.get("data"),
        }
    }
}

#[derive(Default)]
struct Options<'a> {
    tags: &'a [&'a str],
    stream: Option<&'a str>,
    expected_version: Option<i64>,
    id: Option<Uuid>,
}

/// A connection, and the notifications that come on it.
async fn connect() -> Result<(Client, Notes), Error> {
    let var = |name, otherwise: &str| env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    let mut config = Config::new();
    config
        .host(var("PGHOST", "localhost"))
        .port(var("PGPORT", "5432").parse().expect("PGPORT is a number"))
        .user(var("PGUSER", "postgres"))
        .dbname(var("PGDATABASE", "postgres"));
    if let Ok(password) = env::var("PGPASSWORD") {
        config.password(password);
    }
    let (client, mut connection) = config.connect(NoTls).await?;
    let (sender, notes) = unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(note) = message {
                let _ = sender.send(note);
            }
        }
    });
    Ok((client, notes))
}

async fn append(client: &impl GenericClient, event_type: &str, data: Value, options: Options<'_>) -> Result<Appended, Error> {
    let row = client
        .query_one(
            "SELECT position, version, id FROM eventstore.append($1::text::regclass, $2, data => $3, tags => $4,
                 stream => $5, expected_version => $6, id => $7)",
            &[&ORDERS, &event_type, &data, &options.tags, &options.stream, &options.expected_version, &options.id],
        )
        .await?;
    Ok(row.into())
}

async fn append_batch(client: &impl GenericClient, events: Value) -> Result<Vec<Appended>, Error> {
    let sql = "SELECT position, version, id FROM eventstore.append_batch($1::text::regclass, $2)";
    Ok(client.query(sql, &[&ORDERS, &events]).await?.into_iter().map(Appended::from).collect())
}

/// The events of a function in FROM, whose arguments are the parameters.
async fn events(client: &impl GenericClient, function: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Event>, Error> {
    let rows = client.query(&format!("SELECT * FROM eventstore.{function}"), parameters).await?;
    Ok(rows.into_iter().map(Event::from).collect())
}

async fn read_stream(client: &impl GenericClient, stream: &str) -> Result<Vec<Event>, Error> {
    events(client, "read_stream($1::text::regclass, $2)", &[&ORDERS, &stream]).await
}

/// Whether PostgreSQL raised an error with this SQLSTATE.
fn is(error: &Error, sqlstate: &str) -> bool {
    error.code().is_some_and(|code| code.code() == sqlstate)
}

/// Reads the stream, decides, appends; again when another was quicker.  How often it tried.
async fn append_retrying<F>(client: &Client, stream: &str, mut decide: impl FnMut(Vec<Event>) -> F) -> Result<u32, Error>
where
    F: Future<Output = Result<(&'static str, Value), Error>>,
{
    let mut attempt = 1;
    loop {
        let events = read_stream(client, stream).await?;
        let expected_version = Some(events.len() as i64);
        let (event_type, data) = decide(events).await?;
        let options = Options { stream: Some(stream), expected_version, ..Default::default() };
        match append(client, event_type, data, options).await {
            Ok(_) => return Ok(attempt),
            Err(error) if is(&error, VERSION_CONFLICT) && attempt < 10 => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

/// All events up to the head of this moment, page by page.
async fn read_pages(client: &Client, page: i64, mut handle: impl FnMut(Event)) -> Result<(), Error> {
    let head = head_of(client).await?;
    let mut after = None;
    while after.is_none_or(|after| after < head) {
        let events = events(
            client,
            "read($1::text::regclass, after => $2, max_count => $3)",
            &[&ORDERS, &after, &page],
        )
        .await?;
        if (events.len() as i64) < page {
            after = Some(head);
        } else {
            after = events.last().map(|event| event.position);
        }
        events.into_iter().for_each(&mut handle);
    }
    Ok(())
}

// ---- live ------------------------------------------------------------------------

const PAGE: i64 = 100;

async fn head_of(client: &Client) -> Result<i64, Error> {
    Ok(client.query_one("SELECT eventstore.head($1::text::regclass)", &[&ORDERS]).await?.get(0))
}

/// The next page of events after a position, and the position to go on from.
async fn read_on(client: &Client, after: i64) -> Result<(Vec<Event>, i64), Error> {
    let head = head_of(client).await?;
    let function = "read($1::text::regclass, after => $2, max_count => $3)";
    let events = events(client, function, &[&ORDERS, &after, &PAGE]).await?;
    let last = events.last().map_or(after, |event| event.position);
    let next = if events.len() as i64 == PAGE { last } else { last.max(head) };
    Ok((events, next))
}

/// Handles all events after a position, and then each new one, until the connection ends.
async fn follow(client: &Client, notes: &mut Notes, mut after: i64, mut handle: impl FnMut(Event)) -> Result<(), Error> {
    client.query("SELECT * FROM eventstore.listen($1::text::regclass)", &[&ORDERS]).await?;
    loop {
        let (events, next) = read_on(client, after).await?;
        let full = events.len() as i64 == PAGE;
        events.into_iter().for_each(&mut handle);
        after = next;
        if !full && notes.recv().await.is_none() {
            return Ok(());
        }
    }
}

/// The events after a position with all of the tags, waited for if need be.
async fn poll(client: &Client, after: i64, tags: &[&str]) -> Result<Vec<Event>, Error> {
    let function = "read($1::text::regclass, after => $2, tags => $3, wait => '20 s')";
    events(client, function, &[&ORDERS, &after, &tags]).await
}

// ---- subscriptions ---------------------------------------------------------------

type Handled = Result<(), Box<dyn StdError>>;

/// One batch; its place is kept in the transaction of what handle writes.  How many there were.
async fn process(client: &mut Client, name: &str, mut handle: impl FnMut(Event) -> Handled) -> Result<usize, Box<dyn StdError>> {
    let transaction = client.transaction().await?;
    let batch = events(&transaction, "poll($1, $2)", &[&name, &PAGE]).await?;
    let count = batch.len();
    for event in batch {
        handle(event)?; // the transaction, dropped, rolls back
    }
    transaction.commit().await?;
    Ok(count)
}

/// One batch under a lease, for work outside of the database.  What fails comes again.
async fn work(client: &Client, name: &str, member: &str, mut handle: impl FnMut(Event) -> Handled) -> Result<usize, Box<dyn StdError>> {
    let function = "poll($1, $2, member => $3, lease => '1 min')";
    let batch = events(client, function, &[&name, &PAGE, &member]).await?;
    let count = batch.len();
    let mut done = 0;
    for event in batch {
        let position = event.position;
        if let Err(failed) = handle(event) {
            let nack = "SELECT eventstore.nack($1, first => $2, member => $3)";
            client.execute(nack, &[&name, &position, &member]).await?;
            return Err(failed);
        }
        done = position;
    }
    if count > 0 {
        client.execute("SELECT eventstore.ack($1, up_to => $2, member => $3)", &[&name, &done, &member]).await?;
    }
    Ok(count)
}

// ---- the tests: each is a name and what must hold --------------------------------

type Test = Result<(), Box<dyn StdError>>;

/// The SQLSTATE and the DETAIL of an error.
fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, String) {
    let error = result.expect_err("it was not refused");
    let db = error.as_db_error().expect("the server refused");
    (db.code().code().to_owned(), db.detail().unwrap_or_default().to_owned())
}

async fn append_with_named_arguments(client: &mut Client) -> Test {
    let id = Uuid::new_v4();
    let place = || {
        let tags = &["customer:7", "country:de"];
        let options = Options { tags, stream: Some("order-1"), expected_version: Some(0), id: Some(id) };
        append(client, "order.placed", json!({"total": 12.5}), options)
    };
    let first = place().await?;
    assert_eq!((first.version, first.id), (Some(1), id));
    assert_eq!(place().await?, first);
    let event = &read_stream(client, "order-1").await?[0];
    assert_eq!(event.data, Some(json!({"total": 12.5})));
    assert_eq!(event.tags, ["customer:7", "country:de"]);
    Ok(())
}

async fn append_batch_of_json(client: &mut Client) -> Test {
    let batch = (0..30).map(|i| {
        json!({"type": "order.placed", "stream": format!("batch-{}", i % 3), "tags": ["customer:8"],
               "data": {"i": i, "text": "naïve ☃"}, "expected_version": i / 3})
    });
    let rows = append_batch(client, batch.collect()).await?;
    assert_eq!(rows.len(), 30);
    for (i, row) in (0..).zip(&rows) {
        assert_eq!((row.position, row.version), (rows[0].position + i, Some(i / 3 + 1)));
    }
    let event = &read_stream(client, "batch-1").await?[0];
    assert_eq!(event.data, Some(json!({"i": 1, "text": "naïve ☃"})));
    Ok(())
}

fn on_order_2() -> Options<'static> {
    Options { stream: Some("order-2"), ..Default::default() }
}

async fn conflict_is_read_again_and_retried(client: &mut Client) -> Test {
    append(client, "order.placed", json!({}), on_order_2()).await?;
    let mut disturbed = false;
    let attempts = append_retrying(client, "order-2", |events| {
        let disturb = !disturbed;
        disturbed = true;
        async move {
            if disturb {
                let (other, _) = connect().await?;
                append(&other, "order.changed", json!({}), on_order_2()).await?;
            }
            Ok(("order.paid", json!({"after": events.len()})))
        }
    })
    .await?;
    assert_eq!(attempts, 2);
    let types: Vec<String> = read_stream(client, "order-2").await?.into_iter().map(|event| event.event_type).collect();
    assert_eq!(types, ["order.placed", "order.changed", "order.paid"]);
    Ok(())
}

async fn conflict_tells_the_versions(client: &mut Client) -> Test {
    let options = Options { expected_version: Some(1), ..on_order_2() };
    let (code, detail) = refusal(append(client, "order.paid", json!({}), options).await);
    assert_eq!(code, VERSION_CONFLICT);
    assert_eq!(detail, "Stream \"order-2\": expected version 1, actual version 3.");
    Ok(())
}

async fn condition_refuses_the_second(client: &mut Client) -> Test {
    let (client, tags) = (&*client, ["voucher:SPRING"]);
    let query = json!([{"types": ["voucher.used"], "tags": tags}]);
    let used_after = |after: i64| {
        let query = query.clone();
        async move {
            let sql = "SELECT position FROM eventstore.append($1::text::regclass, 'voucher.used', tags => $2,
                fail_if => $3, after => $4)";
            client.query_one(sql, &[&ORDERS, &&tags[..], &query, &after]).await
        }
    };
    let used: i64 = used_after(0).await?.get(0);
    let (code, detail) = refusal(used_after(0).await);
    assert_eq!(code, CONDITION_FAILED);
    assert_eq!(detail, format!("The event at position {used} matches."));
    used_after(used).await?;
    Ok(())
}

async fn pages_give_every_event_once(client: &mut Client) -> Test {
    let whole = events(client, "read($1::text::regclass)", &[&ORDERS]).await?;
    assert!(whole.len() > 30);
    let mut paged = Vec::new();
    read_pages(client, 7, |event| paged.push(event)).await?;
    assert_eq!(paged, whole);
    Ok(())
}

fn versions(events: &[Event]) -> Vec<i64> {
    events.iter().filter_map(|event| event.version).collect()
}

async fn streams_are_read_in_both_directions(client: &mut Client) -> Test {
    let parameters: &[&(dyn ToSql + Sync)] = &[&ORDERS, &"batch-0"];
    let forward = "read_stream($1::text::regclass, $2, from_version => 3, max_count => 4)";
    assert_eq!(versions(&events(client, forward, parameters).await?), [3, 4, 5, 6]);
    let backward = "read_stream($1::text::regclass, $2, direction => 'backward', max_count => 2)";
    assert_eq!(versions(&events(client, backward, parameters).await?), [10, 9]);
    Ok(())
}

async fn peek_of_an_unknown_stream_is_null(client: &mut Client) -> Test {
    let peek = "SELECT type FROM eventstore.peek($1::text::regclass, $2)";
    let nobody: Option<String> = client.query_one(peek, &[&ORDERS, &"nobody"]).await?.get(0);
    assert_eq!(nobody, None);
    let known: Option<String> = client.query_one(peek, &[&ORDERS, &"order-2"]).await?.get(0);
    assert_eq!(known.as_deref(), Some("order.paid"));
    Ok(())
}

async fn insert_appends_and_returns(client: &mut Client) -> Test {
    let sql = format!("INSERT INTO {ORDERS} (type, stream, tags, data) VALUES ($1, $2, $3, $4) RETURNING position, version");
    let row = client
        .query_one(&sql, &[&"order.shipped", &"order-2", &vec!["customer:7"], &json!({"with": "post"})])
        .await?;
    assert_eq!(row.get::<_, i64>("version"), 4);
    assert_eq!(row.get::<_, i64>("position"), head_of(client).await?);
    Ok(())
}

async fn prepared_statements_are_used_again(client: &mut Client) -> Test {
    let counted = client
        .prepare("SELECT version FROM eventstore.append($1::text::regclass, 'order.counted', $2, stream => $3)")
        .await?;
    let read = client
        .prepare("SELECT data FROM eventstore.read_stream($1::text::regclass, $2, from_version => $3)")
        .await?;
    for i in 0..50i64 {
        let data = json!({"i": i});
        let version: i64 = client.query_one(&counted, &[&ORDERS, &data, &"counted"]).await?.get(0);
        assert_eq!(version, i + 1);
        let found: Value = client.query_one(&read, &[&ORDERS, &"counted", &version]).await?.get(0);
        assert_eq!(found, data);
    }
    Ok(())
}

async fn transaction_rolls_back(client: &mut Client) -> Test {
    let transaction = client.transaction().await?;
    append(&transaction, "order.placed", json!({}), Options { stream: Some("rolled-back"), ..Default::default() }).await?;
    transaction.rollback().await?;
    assert_eq!(read_stream(client, "rolled-back").await?, []);
    Ok(())
}

async fn copy_appends(client: &mut Client) -> Test {
    let rows: String = (0..500)
        .map(|i| format!("order.imported\t{{\"i\": {i}}}\t{{customer:9}}\timported-{}\n", i % 5))
        .collect();
    let sink = client.copy_in(&format!("COPY {ORDERS} (type, data, tags, stream) FROM STDIN")).await?;
    pin_mut!(sink);
    sink.send(std::io::Cursor::new(rows)).await?;
    assert_eq!(sink.finish().await?, 500);
    let read = versions(&read_stream(client, "imported-4").await?);
    assert_eq!(read, (1..=100).collect::<Vec<i64>>());
    Ok(())
}

async fn place(client: &Client, tags: &[&str]) -> Result<Appended, Error> {
    append(client, "order.placed", json!({}), Options { tags, ..Default::default() }).await
}

/// A connection of its own, once the session of a process sleeps in a wait.
async fn once_asleep(pid: i32) -> Result<Client, Error> {
    let (other, _) = connect().await?;
    let sql = "SELECT coalesce(wait_event_type = 'Extension', false) FROM pg_stat_activity WHERE pid = $1";
    while !other.query_one(sql, &[&pid]).await?.get::<_, bool>(0) {}
    Ok(other)
}

async fn pid_of(client: &Client) -> Result<i32, Error> {
    Ok(client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0))
}

async fn listen_returns_where_to_read_from(client: &mut Client) -> Test {
    let (listening, mut notes) = connect().await?;
    let row = listening.query_one("SELECT * FROM eventstore.listen($1::text::regclass)", &[&ORDERS]).await?;
    let (channel, head): (String, i64) = (row.get("channel"), row.get("head"));
    assert_eq!((channel, head), (format!("public.{ORDERS}"), head_of(client).await?));
    place(client, &[]).await?;
    let note = notes.recv().await.ok_or("the connection ended")?;
    assert_eq!(note.channel(), format!("public.{ORDERS}"));
    let payload: Value = serde_json::from_str(note.payload())?;
    assert_eq!(payload, json!({"collection": note.channel(), "head": head + 1, "count": 1}));
    Ok(())
}

async fn follower_misses_and_repeats_nothing(client: &mut Client) -> Test {
    let after = head_of(client).await?;
    for _ in 0..250 {
        place(client, &[]).await?;
    }
    let (listening, mut notes) = connect().await?;
    let (sender, mut found) = unbounded_channel();
    let follower = tokio::spawn(async move {
        follow(&listening, &mut notes, after, |event| sender.send(event.position).expect("somebody reads")).await
    });
    for i in 1..=300 {
        if i > 250 {
            place(client, &[]).await?;
        }
        assert_eq!(found.recv().await, Some(after + i));
    }
    follower.abort();
    Ok(())
}

async fn long_poll_is_woken(client: &mut Client) -> Test {
    let pid = pid_of(client).await?;
    let placed = |tags: &'static [&str]| async move { place(&once_asleep(pid).await?, tags).await };
    let after = head_of(client).await?;
    let (events, _) = tokio::try_join!(poll(client, after, &["rare:1"]), placed(&["rare:1"]))?;
    assert_eq!(events.iter().map(|event| &event.tags[..]).collect::<Vec<_>>(), [["rare:1"]]);
    for (i, statement) in (1..).zip(["SELECT eventstore.wait_for", "CALL eventstore.await"]) {
        let statement = format!("{statement}($1::text::regclass, $2)");
        let from = after + i;
        let parameters: [&(dyn ToSql + Sync); 2] = [&ORDERS, &from];
        let (row, _) = tokio::try_join!(client.query_one(&statement, &parameters), placed(&[]))?;
        assert_eq!(row.get::<_, i64>(0), from + 1);
    }
    Ok(())
}

async fn long_poll_comes_to_its_timeout(client: &mut Client) -> Test {
    let head = head_of(client).await?;
    let row = client.query_one("SELECT eventstore.wait_for($1::text::regclass, $2, '20 ms')", &[&ORDERS, &head]).await?;
    assert_eq!(row.get::<_, i64>(0), head);
    client.batch_execute("BEGIN; SET LOCAL statement_timeout = '20 ms'").await?;
    assert_eq!(refusal(poll(client, head, &[]).await).0, CANCELLED);
    client.batch_execute("ROLLBACK").await?;
    Ok(())
}

async fn long_poll_is_cancelled(client: &mut Client) -> Test {
    let head = head_of(client).await?;
    for statement in ["SELECT eventstore.wait_for($1::text::regclass, $2, NULL)",
                      "CALL eventstore.await($1::text::regclass, $2, timeout => NULL)"] {
        // cancel_query() does not wait until the server has done with it, and could
        // still reach what this connection is asked next: so it is asked nothing.
        let (waiting, _notes) = connect().await?;
        let pid = pid_of(&waiting).await?;
        let parameters: [&(dyn ToSql + Sync); 2] = [&ORDERS, &head];
        let (cancelled, waited) = tokio::join!(
            async {
                once_asleep(pid).await?;
                waiting.cancel_token().cancel_query(NoTls).await
            },
            waiting.query(statement, &parameters)
        );
        cancelled?;
        assert_eq!(refusal(waited).0, CANCELLED);
    }
    assert_eq!(head_of(client).await?, head);
    Ok(())
}

/// A subscription to what is tagged with its name, and three events that it will get.
async fn subscribe_to_bills(client: &Client, name: &str) -> Result<Vec<i64>, Error> {
    let subscribe = "SELECT eventstore.subscribe($1, $2::text::regclass, query => $3)";
    client.execute(subscribe, &[&name, &ORDERS, &json!([{"tags": [name]}])]).await?;
    let mut positions = Vec::new();
    for _ in 0..3 {
        positions.push(place(client, &[name]).await?.position);
    }
    Ok(positions)
}

async fn subscription_moves_with_the_transaction(client: &mut Client) -> Test {
    let name = format!("{ORDERS}_bills");
    let positions = subscribe_to_bills(client, &name).await?;
    let mut handled = Vec::new();
    let mut handle = |event: Event| {
        handled.push(event.position);
        if handled.len() == 3 { Err("the application gave up".into()) } else { Ok(()) }
    };
    assert_eq!(process(client, &name, &mut handle).await.unwrap_err().to_string(), "the application gave up");
    assert_eq!(process(client, &name, &mut handle).await?, 3);
    assert_eq!(process(client, &name, &mut handle).await?, 0);
    assert_eq!(handled, [&positions[..], &positions[..]].concat());
    Ok(())
}

async fn subscription_leases_work(client: &mut Client) -> Test {
    let name = format!("{ORDERS}_mails");
    let positions = subscribe_to_bills(client, &name).await?;
    let mut handled = Vec::new();
    let mut calls = 0;
    let mut handle = |event: Event| {
        calls += 1;
        if calls == 2 {
            return Err("the mail server is away".into());
        }
        handled.push(event.position);
        Ok(())
    };
    assert_eq!(work(client, &name, "host-1", &mut handle).await.unwrap_err().to_string(), "the mail server is away");
    assert_eq!(work(client, &name, "host-2", &mut handle).await?, 2);
    assert_eq!(work(client, &name, "host-1", &mut handle).await?, 0);
    assert_eq!(handled, positions);
    Ok(())
}

/// Runs tests by their names.  One that panics ends the program.
macro_rules! run {
    ($client:expr, $($test:ident),+ $(,)?) => {{
        println!("1..{}", [$(stringify!($test)),+].len());
        let mut failed = 0;
        $(
            let name = stringify!($test).replace('_', " ");
            match $test($client).await {
                Ok(()) => println!("ok {name}"),
                Err(error) => {
                    failed += 1;
                    println!("not ok {name}\n{error:?}");
                }
            }
        )+
        failed
    }};
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn StdError>> {
    let (mut client, _) = connect().await?;
    client.execute("SELECT eventstore.create_collection($1)", &[&ORDERS]).await?;
    let failed = run!(
        &mut client,
        append_with_named_arguments,
        append_batch_of_json,
        conflict_is_read_again_and_retried,
        conflict_tells_the_versions,
        condition_refuses_the_second,
        pages_give_every_event_once,
        streams_are_read_in_both_directions,
        peek_of_an_unknown_stream_is_null,
        insert_appends_and_returns,
        prepared_statements_are_used_again,
        transaction_rolls_back,
        copy_appends,
        listen_returns_where_to_read_from,
        follower_misses_and_repeats_nothing,
        long_poll_is_woken,
        long_poll_comes_to_its_timeout,
        long_poll_is_cancelled,
        subscription_moves_with_the_transaction,
        subscription_leases_work,
    );
    client.execute("SELECT eventstore.drop_collection($1::text::regclass)", &[&ORDERS]).await?;
    std::process::exit(if failed > 0 { 1 } else { 0 });
}
