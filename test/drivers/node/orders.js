// eventstore from JavaScript, with node-postgres.
//
// Each function below is one thing that an application does.  The connection's
// parameters come from PGHOST and the like.
'use strict';

const assert = require('node:assert').strict;
const { once } = require('node:events');
const { randomUUID } = require('node:crypto');
const { Readable } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const { Client, types } = require('pg');
const { from: copyFrom } = require('pg-copy-streams');

const ORDERS = 'orders_node';
const VERSION_CONFLICT = 'LG001';
const CONDITION_FAILED = 'LG002';
const CANCELLED = '57014';

// Positions and versions are bigint, which node-postgres gives as text otherwise.
types.setTypeParser(types.builtins.INT8, BigInt);

async function connect() {
	const client = new Client();
	await client.connect();
	return client;
}

// One event; returns position, version and id.
async function append(client, type, data, { tags = [], stream, expectedVersion, id } = {}) {
	const { rows } = await client.query(
		`SELECT position, version, id FROM eventstore.append($1, $2, data => $3, tags => $4,
		     stream => $5, expected_version => $6, id => $7)`,
		[ORDERS, type, data, tags, stream, expectedVersion, id]);
	return rows[0];
}

// Several; node-postgres would make an SQL array of a JavaScript one, so it is made JSON here.
async function appendBatch(client, events) {
	const { rows } = await client.query(
		'SELECT position, version, id FROM eventstore.append_batch($1, $2)',
		[ORDERS, JSON.stringify(events)]);
	return rows;
}

async function readStream(client, stream, { fromVersion, maxCount, direction = 'forward' } = {}) {
	const { rows } = await client.query(
		`SELECT * FROM eventstore.read_stream($1, $2, from_version => $3, max_count => $4,
		     direction => $5)`,
		[ORDERS, stream, fromVersion, maxCount, direction]);
	return rows;
}

// Reads the stream, decides, appends; again when another was quicker.  How often it tried.
async function appendRetrying(client, stream, decide) {
	for (let attempt = 1; attempt < 10; attempt++) {
		const events = await readStream(client, stream);
		const { type, data } = await decide(events);
		try {
			await append(client, type, data, { stream, expectedVersion: events.length });
			return attempt;
		} catch (error) {
			if (error.code !== VERSION_CONFLICT) throw error;
		}
	}
	throw new Error(`stream ${stream} is never at rest`);
}

// All events up to the head of this moment, page by page.
async function* readPages(client, page, after = null) {
	const head = (await client.query('SELECT eventstore.head($1)', [ORDERS])).rows[0].head;
	for (;;) {
		const { rows } = await client.query(
			'SELECT * FROM eventstore.read($1, after => $2, max_count => $3)',
			[ORDERS, after, page]);
		yield* rows;
		if (rows.length < page) return;
		after = rows.at(-1).position;
		if (after >= head) return;
	}
}

// ---- live ------------------------------------------------------------------------

const PAGE = 100;

async function headOf(client) {
	return (await client.query('SELECT eventstore.head($1)', [ORDERS])).rows[0].head;
}

// The next page of events after a position, and the position to go on from.
async function readOn(client, after) {
	const head = await headOf(client);
	const { rows: events } = await client.query(
		'SELECT * FROM eventstore.read($1, after => $2, max_count => $3)', [ORDERS, after, PAGE]);
	const last = events.at(-1)?.position ?? after;
	return { events, next: events.length === PAGE || last > head ? last : head };
}

// All events after a position, and then each new one, for ever.  The client is for this alone.
async function* follow(client, after) {
	let told = true;
	let wake = () => {};
	client.on('notification', () => { told = true; wake(); });
	await client.query('SELECT * FROM eventstore.listen($1)', [ORDERS]);
	for (;;) {
		told = false;
		const { events, next } = await readOn(client, after);
		after = next;
		yield* events;
		if (events.length < PAGE && !told) await new Promise((resolve) => { wake = resolve; });
	}
}

// The events after a position with all of the tags, waited for if need be.
async function poll(client, after, tags = []) {
	const { rows } = await client.query(
		"SELECT * FROM eventstore.read($1, after => $2, tags => $3, wait => '20 s')",
		[ORDERS, after, tags]);
	return rows;
}

// ---- subscriptions ---------------------------------------------------------------

// Does something in a transaction.
async function transaction(client, action) {
	await client.query('BEGIN');
	try {
		const result = await action();
		await client.query('COMMIT');
		return result;
	} catch (error) {
		await client.query('ROLLBACK');
		throw error;
	}
}

// One batch; its place is kept in the transaction of what handle writes.  How many there were.
async function processBatch(client, name, handle) {
	return transaction(client, async () => {
		const { rows } = await client.query('SELECT * FROM eventstore.poll($1, $2)', [name, PAGE]);
		for (const event of rows) await handle(event);
		return rows.length;
	});
}

// One batch under a lease, for work outside of the database.  What fails comes again.
async function work(client, name, member, handle) {
	const { rows } = await client.query(
		"SELECT * FROM eventstore.poll($1, $2, member => $3, lease => '1 min')", [name, PAGE, member]);
	for (const event of rows) {
		try {
			await handle(event);
		} catch (error) {
			await client.query('SELECT eventstore.nack($1, first => $2, member => $3)', [name, event.position, member]);
			throw error;
		}
	}
	if (rows.length > 0) {
		await client.query('SELECT eventstore.ack($1, up_to => $2, member => $3)', [name, rows.at(-1).position, member]);
	}
	return rows.length;
}

// ---- the tests: each is a name and what must hold --------------------------------

// A subscription to what is tagged with its name, and three events that it will get.
async function subscribeToBills(client, name) {
	await client.query('SELECT eventstore.subscribe($1, $2, query => $3)',
		[name, ORDERS, JSON.stringify([{ tags: [name] }])]);
	const positions = [];
	for (let i = 0; i < 3; i++) {
		positions.push((await append(client, 'order.billed', {}, { tags: [name] })).position);
	}
	return positions;
}

// Does something, from a connection of its own, once the session of a client sleeps in a wait.
async function meanwhile(client, action) {
	const other = await connect();
	try {
		for (;;) {
			const { rows } = await other.query(
				"SELECT wait_event_type = 'Extension' AS asleep FROM pg_stat_activity WHERE pid = $1",
				[client.processID]);
			if (rows[0].asleep) break;
		}
		return await action(other);
	} finally {
		await other.end();
	}
}

const tests = {
	async 'append with named arguments'(client) {
		const id = randomUUID();
		const options = { tags: ['customer:7', 'country:de'], stream: 'order-1', expectedVersion: 0, id };
		const first = await append(client, 'order.placed', { total: 12.5 }, options);
		assert.equal(first.version, 1n);
		assert.equal(first.id, id);
		assert.deepEqual(await append(client, 'order.placed', { total: 12.5 }, options), first);
		const [event] = await readStream(client, 'order-1');
		assert.deepEqual(event.data, { total: 12.5 });
		assert.deepEqual(event.tags, ['customer:7', 'country:de']);
	},

	async 'append batch of json'(client) {
		const events = Array.from({ length: 30 }, (_, i) => ({
			type: 'order.placed', stream: `batch-${i % 3}`, data: { i, text: 'naïve ☃' },
			tags: ['customer:8'], expected_version: Math.floor(i / 3),
		}));
		const rows = await appendBatch(client, events);
		rows.forEach((row, i) => {
			assert.equal(row.position, rows[0].position + BigInt(i));
			assert.equal(row.version, BigInt(Math.floor(i / 3) + 1));
		});
		assert.deepEqual((await readStream(client, 'batch-1'))[0].data, { i: 1, text: 'naïve ☃' });
	},

	async 'conflict is read again and retried'(client) {
		await append(client, 'order.placed', {}, { stream: 'order-2' });
		let disturbed = false;
		const attempts = await appendRetrying(client, 'order-2', async (events) => {
			if (!disturbed) {
				disturbed = true;
				const other = await connect();
				await append(other, 'order.changed', {}, { stream: 'order-2' });
				await other.end();
			}
			return { type: 'order.paid', data: { after: events.length } };
		});
		assert.equal(attempts, 2);
		assert.deepEqual((await readStream(client, 'order-2')).map((event) => event.type),
			['order.placed', 'order.changed', 'order.paid']);
	},

	async 'conflict tells the versions'(client) {
		await assert.rejects(
			append(client, 'order.paid', {}, { stream: 'order-2', expectedVersion: 1 }),
			{ code: VERSION_CONFLICT, detail: 'Stream "order-2": expected version 1, actual version 3.' });
	},

	async 'condition refuses the second'(client) {
		const query = JSON.stringify([{ types: ['voucher.used'], tags: ['voucher:SPRING'] }]);
		const use = async (after) => (await client.query(
			`SELECT position FROM eventstore.append($1, 'voucher.used', tags => $2,
			     fail_if => $3, after => $4)`,
			[ORDERS, ['voucher:SPRING'], query, after])).rows[0].position;
		const used = await use(0);
		await assert.rejects(use(0),
			{ code: CONDITION_FAILED, detail: `The event at position ${used} matches.` });
		await use(used);
	},

	async 'pages give every event once'(client) {
		const whole = (await client.query('SELECT * FROM eventstore.read($1)', [ORDERS])).rows;
		assert.ok(whole.length > 30);
		const paged = [];
		for await (const event of readPages(client, 7)) paged.push(event);
		assert.deepEqual(paged, whole);
	},

	async 'streams are read in both directions'(client) {
		const versions = async (options) =>
			(await readStream(client, 'batch-0', options)).map((event) => event.version);
		assert.deepEqual(await versions({ fromVersion: 3, maxCount: 4 }), [3n, 4n, 5n, 6n]);
		assert.deepEqual(await versions({ direction: 'backward', maxCount: 2 }), [10n, 9n]);
	},

	async 'peek of an unknown stream is null'(client) {
		const peek = async (stream) =>
			(await client.query('SELECT * FROM eventstore.peek($1, $2)', [ORDERS, stream])).rows[0];
		assert.equal((await peek('nobody')).position, null);
		assert.equal((await peek('order-2')).type, 'order.paid');
	},

	async 'insert appends and returns'(client) {
		const { rows: [row] } = await client.query(
			`INSERT INTO ${ORDERS} (type, stream, tags, data) VALUES ($1, $2, $3, $4)
			 RETURNING position, version`,
			['order.shipped', 'order-2', ['customer:7'], { with: 'post' }]);
		assert.equal(row.version, 4n);
		const { rows: [{ head }] } = await client.query('SELECT eventstore.head($1)', [ORDERS]);
		assert.equal(head, row.position);
	},

	async 'prepared statements are used again'(client) {
		for (let i = 0; i < 50; i++) {
			const appended = await client.query({
				name: 'append-counted',
				text: "SELECT version FROM eventstore.append($1, 'order.counted', $2, stream => $3)",
				values: [ORDERS, { i }, 'counted'],
			});
			assert.equal(appended.rows[0].version, BigInt(i + 1));
			const read = await client.query({
				name: 'read-counted',
				text: 'SELECT data FROM eventstore.read_stream($1, $2, from_version => $3)',
				values: [ORDERS, 'counted', i + 1],
			});
			assert.deepEqual(read.rows, [{ data: { i } }]);
		}
	},

	async 'transaction rolls back'(client) {
		await client.query('BEGIN');
		await append(client, 'order.placed', {}, { stream: 'rolled-back' });
		await client.query('ROLLBACK');
		assert.deepEqual(await readStream(client, 'rolled-back'), []);
	},

	async 'copy appends'(client) {
		const rows = Array.from({ length: 500 }, (_, i) =>
			`order.imported\t{"i": ${i}}\t{customer:9}\timported-${i % 5}\n`);
		await pipeline(Readable.from(rows),
			client.query(copyFrom(`COPY ${ORDERS} (type, data, tags, stream) FROM STDIN`)));
		const versions = (await readStream(client, 'imported-4')).map((event) => event.version);
		assert.deepEqual(versions, Array.from({ length: 100 }, (_, i) => BigInt(i + 1)));
	},

	async 'listen returns where to read from'(client) {
		const listening = await connect();
		const { rows: [{ channel, head }] } = await listening.query('SELECT * FROM eventstore.listen($1)', [ORDERS]);
		assert.equal(channel, `public.${ORDERS}`);
		assert.equal(head, await headOf(client));
		const note = once(listening, 'notification');
		await append(client, 'order.placed', {});
		const [{ payload }] = await note;
		assert.deepEqual(JSON.parse(payload), { collection: channel, head: Number(head) + 1, count: 1 });
		await listening.end();
	},

	async 'follower misses and repeats nothing'(client) {
		const after = await headOf(client);
		for (let i = 0; i < 250; i++) await append(client, 'order.followed', {});
		const listening = await connect();
		const follower = follow(listening, after);
		const found = [];
		for (let i = 0; i < 300; i++) {
			if (i >= 250) await append(client, 'order.followed', {});
			found.push((await follower.next()).value.position);
		}
		assert.deepEqual(found, Array.from({ length: 300 }, (_, i) => after + BigInt(i + 1)));
		await listening.end();
	},

	async 'long poll is woken'(client) {
		const after = await headOf(client);
		const placed = (tags) => meanwhile(client, (other) => append(other, 'order.placed', {}, { tags }));
		const [events] = await Promise.all([poll(client, after, ['rare:1']), placed(['rare:1'])]);
		assert.deepEqual(events.map((event) => event.tags), [['rare:1']]);
		const [waited] = await Promise.all([
			client.query('SELECT eventstore.wait_for($1, $2)', [ORDERS, after + 1n]), placed()]);
		assert.equal(waited.rows[0].wait_for, after + 2n);
		const [awaited] = await Promise.all([
			client.query('CALL eventstore.await($1, $2)', [ORDERS, after + 2n]), placed()]);
		assert.equal(awaited.rows[0].head, after + 3n);
	},

	async 'long poll comes to its timeout'(client) {
		const head = await headOf(client);
		const { rows } = await client.query("SELECT eventstore.wait_for($1, $2, '20 ms')", [ORDERS, head]);
		assert.equal(rows[0].wait_for, head);
		await client.query('BEGIN');
		await client.query("SET LOCAL statement_timeout = '20 ms'");
		await assert.rejects(poll(client, head), { code: CANCELLED });
		await client.query('ROLLBACK');
	},

	// node-postgres has no public call for it, so another connection does it.
	async 'long poll is cancelled'(client) {
		const cancel = () => meanwhile(client, (other) => other.query('SELECT pg_cancel_backend($1)', [client.processID]));
		for (const statement of ['SELECT eventstore.wait_for($1, $2, NULL)', 'CALL eventstore.await($1, $2, timeout => NULL)']) {
			const head = await headOf(client);
			await Promise.all([
				assert.rejects(client.query(statement, [ORDERS, head]), { code: CANCELLED }), cancel()]);
		}
		assert.ok(await headOf(client) > 0n);
	},

	async 'subscription moves with the transaction'(client) {
		const name = `${ORDERS}_bills`;
		const positions = await subscribeToBills(client, name);
		const handled = [];
		await assert.rejects(processBatch(client, name, (event) => {
			handled.push(event.position);
			if (handled.length === 3) throw new Error('the application gave up');
		}), /gave up/);
		assert.equal(await processBatch(client, name, (event) => handled.push(event.position)), 3);
		assert.deepEqual(handled, [...positions, ...positions]);
		assert.equal(await processBatch(client, name, assert.fail), 0);
	},

	async 'subscription leases work'(client) {
		const name = `${ORDERS}_mails`;
		const positions = await subscribeToBills(client, name);
		const handled = [];
		await assert.rejects(work(client, name, 'host-1', (event) => {
			if (handled.length === 1) throw new Error('the mail server is away');
			handled.push(event.position);
		}), /away/);
		assert.equal(await work(client, name, 'host-2', (event) => handled.push(event.position)), 2);
		assert.deepEqual(handled, positions);
		assert.equal(await work(client, name, 'host-1', assert.fail), 0);
	},
};

async function main() {
	const client = await connect();
	await client.query('SELECT eventstore.create_collection($1)', [ORDERS]);
	console.log(`1..${Object.keys(tests).length}`);
	for (const [name, test] of Object.entries(tests)) {
		try {
			await test(client);
			console.log(`ok ${name}`);
		} catch (error) {
			process.exitCode = 1;
			console.log(`not ok ${name}\n${error.stack}`);
		}
	}
	await client.query('SELECT eventstore.drop_collection($1)', [ORDERS]);
	await client.end();
}

main();
