// The page: three views, chosen by the part of the address after "#".
//
// All that comes from the server goes into the page as text (make() knows no HTML):
// what events hold was written by anybody.

const ROWS = 500; // as many events are shown; the others are in the collection
const REFRESH_MS = 2000;
const SHOW_MS = 200; // between two additions to what is shown
const FEW = 20; // more than that do not catch the eye one by one

const $ = (id) => document.getElementById(id);

// make('td', { class: 'number' }, 'text', anotherElement): an element.
function make(name, attributes = {}, ...children) {
	const element = document.createElement(name);
	for (const [key, value] of Object.entries(attributes)) {
		if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
		else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
	}
	element.append(...children.filter((child) => child !== null && child !== undefined));
	return element;
}

function query(parameters) {
	const found = new URLSearchParams();
	for (const [name, value] of Object.entries(parameters)) {
		for (const one of [value].flat()) if (one !== null && one !== undefined && one !== '') found.append(name, one);
	}
	return found;
}

function notice(text) {
	$('notice').textContent = text ?? '';
	$('notice').hidden = !text;
}

function explain({ message, detail, hint }) {
	return [message, detail, hint].filter(Boolean).join(' – ');
}

async function get(path, parameters = {}) {
	const answer = await fetch(`${path}?${query(parameters)}`);
	const body = await answer.json().catch(() => ({ message: `${answer.status} ${answer.statusText}` }));
	if (!answer.ok) throw new Error(explain(body));
	return body;
}

// Runs one thing a user asked for; what went wrong is shown.
async function attempt(action) {
	try {
		return await action();
	} catch (error) {
		notice(error.message);
		return undefined;
	}
}

const number = new Intl.NumberFormat('en').format;
// To the millisecond today, else with the day.
function timeOf(iso) {
	const [at, two] = [new Date(iso), '2-digit'];
	const text = at.toDateString() === new Date().toDateString()
		? at.toLocaleTimeString('en-GB', { hour: two, minute: two, second: two, fractionalSecondDigits: 3 })
		: at.toLocaleString('sv-SE', { dateStyle: 'short', timeStyle: 'short' });
	return make('time', { datetime: iso, title: at.toLocaleString() }, text);
}

function bytes(count) {
	const units = ['B', 'kB', 'MB', 'GB', 'TB'];
	let unit = 0;
	for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
	return `${count.toFixed(count < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

function typeOf(name) {
	const element = make('span', { class: 'type', title: name }, name);
	const hash = [...name].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
	element.style.setProperty('--hue', hash);
	return element;
}

// ---- where the page is -------------------------------------------------------------

function address() {
	const [view, search] = location.hash.replace(/^#\/?/, '').split('?');
	return { view: view || 'events', parameters: new URLSearchParams(search) };
}

function go(view, parameters) {
	location.hash = `/${view}?${query(parameters)}`;
}

function fill(select, names, chosen) {
	const wanted = chosen && !names.includes(chosen) ? [chosen, ...names] : names;
	select.replaceChildren(...wanted.map((name) => make('option', { value: name }, name)));
	select.value = chosen ?? wanted[0] ?? '';
}

// ---- events ------------------------------------------------------------------------

const live = { source: null, last: 0, oldest: null, pending: [], frame: 0, shown: 0, paused: false, retry: 0 };
const rows = document.querySelector('#log tbody');

const filter = () => ({ collection: $('collection').value, tag: [...$('tags').children].map((chip) => chip.dataset.tag), type: $('type').value });
const goFiltered = (change) => go('events', { ...filter(), ...change });

function say(state, text = state) {
	$('state').dataset.state = state;
	$('state').textContent = text;
}

function addTag(tag) {
	const { tag: tags } = filter();
	if (tag && !tags.includes(tag)) goFiltered({ tag: [...tags, tag] });
}

function tagButton(tag) {
	return make('button', { class: 'tag', type: 'button', title: `only ${tag}`, onclick: (click) => { click.stopPropagation(); addTag(tag); } }, tag);
}

function eventRow(event, fresh) {
	const data = event.data !== null ? event.data + (event.cut ? ' …' : '')
		: event.body_bytes !== null ? `${bytes(event.body_bytes)} of body` : '';
	return make('tr', { class: fresh ? 'event fresh' : 'event', 'data-position': event.position, onclick: toggleDetail },
		make('td', { class: 'number' }, event.position),
		make('td', {}, timeOf(event.created_at)),
		make('td', {}, typeOf(event.type)),
		make('td', { title: event.stream }, event.stream ?? '', event.stream && make('span', { class: 'dim' }, ` ${event.version}`)),
		make('td', {}, ...event.tags.map(tagButton)),
		make('td', { class: 'mono' }, data));
}

async function toggleDetail() {
	const next = this.nextElementSibling;
	if (next?.className === 'detail') return next.remove();
	const event = await attempt(() => get(`/api/events/${this.dataset.position}`, { collection: $('collection').value }));
	if (!event || this.nextElementSibling?.className === 'detail') return undefined;
	const fields = make('dl');
	for (const name of ['id', 'stream', 'version', 'created_at', 'tags', 'data', 'metadata', 'body']) {
		const value = event[name];
		if (value === null || value === undefined || value.length === 0) continue;
		fields.append(make('dt', {}, name), make('dd', {}, ['data', 'metadata', 'body'].includes(name)
			? make('pre', {}, value) : String(Array.isArray(value) ? value.join(', ') : value)));
	}
	return this.after(make('tr', { class: 'detail' }, make('td', { colspan: 6 }, fields)));
}

function trim() {
	while (rows.children.length > ROWS) rows.lastElementChild.remove();
	live.oldest = Number([...rows.querySelectorAll('.event')].at(-1)?.dataset.position ?? 0) || null;
	document.querySelector('#events .empty').hidden = rows.children.length > 0;
}

// Not more often than one can see, and not while nobody looks: then only the newest are kept.
function showPending() {
	live.frame = 0;
	live.shown = performance.now();
	if (live.paused) return;
	const fresh = live.pending.splice(0).slice(-ROWS);
	rows.prepend(...fresh.reverse().map((event) => eventRow(event, fresh.length <= FEW)));
	if (rows.children.length > ROWS || fresh.length === ROWS) $('older').hidden = false;
	trim();
}

function receive(event) {
	if (event.position <= live.last) return;
	live.last = event.position;
	live.pending.push(event);
	if (live.pending.length > 2 * ROWS) live.pending.splice(0, ROWS);
	if (live.paused) say('waiting', `paused, ${live.pending.length} new`);
	else live.frame ||= setTimeout(requestAnimationFrame, Math.max(0, live.shown + SHOW_MS - performance.now()), showPending);
}

function stop() {
	live.source?.close();
	live.source = null;
	clearTimeout(live.retry);
	clearTimeout(live.frame);
	live.frame = 0;
	say('off');
}

// The browser comes back by itself, and says the id of the last event (Last-Event-ID).
// Where it gives up, after an answer that is no stream, it is told to from here.
function follow(after) {
	const source = new EventSource(`/api/live?${query({ ...filter(), after })}`);
	live.source = source;
	source.onopen = () => say(live.paused ? 'waiting' : 'live', live.paused ? 'paused' : 'live');
	source.onmessage = ({ data }) => receive(JSON.parse(data));
	source.addEventListener('lost', ({ data }) => {
		live.last = 0;
		rows.replaceChildren();
		notice(`Some events were gone before this page could show them. ${explain(JSON.parse(data))}`);
	});
	source.addEventListener('refused', ({ data }) => {
		stop();
		say('ended');
		notice(explain(JSON.parse(data)));
	});
	source.onerror = () => {
		if (live.source !== source) return;
		say('waiting', 'reconnecting');
		if (source.readyState === EventSource.CLOSED) {
			live.retry = setTimeout(() => live.source === source && follow(Math.max(live.last, after)), 2000);
		}
	};
}

async function showEvents(parameters) {
	stop();
	const { collections } = await get('/api/overview');
	fill($('collection'), collections.map((one) => one.collection), parameters.get('collection'));
	$('tags').replaceChildren(...parameters.getAll('tag').map((tag) => make('button', {
		class: 'tag', type: 'button', 'data-tag': tag, title: 'all tags again',
		onclick: () => goFiltered({ tag: filter().tag.filter((other) => other !== tag) }),
	}, tag)));
	$('type').value = parameters.get('type') ?? '';
	rows.replaceChildren();
	live.pending = [];
	live.last = 0;
	if (!$('collection').value) {
		notice('There is no collection that this role may read.');
		return;
	}
	const { events, after, more } = await get('/api/events', filter());
	rows.append(...events.map((event) => eventRow(event, false)));
	live.last = after;
	$('older').hidden = !more;
	trim();
	follow(after);
}

async function showOlder() {
	const { events, more } = await get('/api/events', { ...filter(), before: live.oldest });
	rows.append(...events.map((event) => eventRow(event, false)));
	live.oldest = events.at(-1)?.position ?? live.oldest;
	$('older').hidden = !more;
}

function pause() {
	live.paused = !live.paused;
	$('pause').setAttribute('aria-pressed', live.paused);
	$('pause').textContent = live.paused ? 'Go on' : 'Pause';
	if (live.source) say(live.paused ? 'waiting' : 'live', live.paused ? 'paused' : 'live');
	showPending();
}

// ---- overview ----------------------------------------------------------------------

const overview = { timer: 0, heads: new Map(), at: 0 };

function table(title, columns, items, none) {
	const head = columns.map(([name, , kind]) => make('th', { class: kind }, name));
	const body = items.map((item) => make('tr', { 'data-name': item.name ?? item.collection },
		...columns.map(([, value, kind]) => make('td', { class: kind }, value(item) ?? ''))));
	return [make('h2', {}, title), make('div', { class: 'scroll' }, items.length === 0 ? make('p', { class: 'empty' }, none)
		: make('table', {}, make('thead', {}, make('tr', {}, ...head)), make('tbody', {}, ...body)))];
}

function lag(count, seconds) {
	if (count === null) return '';
	const much = make('meter', { min: 0, max: 6, low: 2, high: 4, optimum: 0, value: Math.log10(count + 1) });
	const text = seconds ? `${number(count)} · ${number(Math.round(seconds))} s` : number(count);
	return make('span', {}, much, make('span', {}, text));
}

function state({ state: name, message }) {
	const kind = name === 'running' ? 'good' : ['failed', 'denied', 'stopped', 'gap', 'fenced'].includes(name) ? 'bad' : 'warn';
	return make('span', { class: `state ${kind}`, title: message }, name);
}

// Positions in a second, from this refresh and the one before.
function rates(collections) {
	const seconds = (performance.now() - overview.at) / 1000;
	const found = new Map(collections.map(({ collection, head }) => [collection,
		overview.heads.has(collection) ? (head - overview.heads.get(collection)) / seconds : null]));
	overview.at = performance.now();
	overview.heads = new Map(collections.map(({ collection, head }) => [collection, head]));
	return found;
}

const toEvents = (name) => make('a', { href: `#/events?${query({ collection: name })}` }, name);
const kept = (one) => [one.retain_events && `${number(one.retain_events)} events`, one.retain_for, one.retain_bytes && bytes(one.retain_bytes)].filter(Boolean).join(', ') || 'all';

async function refreshOverview() {
	const found = await get('/api/overview');
	const rate = rates(found.collections);
	const sum = (values) => number(Math.round([...values].reduce((total, one) => total + (one ?? 0), 0)));
	const tile = (value, text) => make('div', { class: 'tile' }, make('b', {}, value), make('span', {}, text));
	if (address().view !== 'overview') return;
	$('overview').replaceChildren(
		make('div', { class: 'tiles' },
			tile(number(found.collections.length), 'collections'),
			tile(sum(rate.values()), 'events a second'),
			tile(bytes(found.collections.reduce((total, one) => total + one.bytes, 0)), 'on disk'),
			tile(sum(found.subscriptions.map((one) => one.lag_events)), 'events not yet handled'),
			tile(number(found.watchers), 'browsers watching')),
		...table('Collections', [
			['Name', (one) => toEvents(one.collection)],
			['Head', (one) => number(one.head ?? 0), 'number'],
			['A second', (one) => (rate.get(one.collection) === null ? '–' : number(Math.round(rate.get(one.collection)))), 'number'],
			['Size', (one) => bytes(one.bytes), 'number'],
			['Segments', (one) => number(one.segments), 'number'],
			['Keeps', kept], ['Notifies', (one) => one.notify],
		], found.collections, 'No collection that this role may read.'),
		...table('Subscriptions', [
			['Name', (one) => one.name], ['Collection', (one) => toEvents(one.collection)],
			['Behind', (one) => lag(one.lag_events, one.lag_seconds)],
			['Position', (one) => number(one.position), 'number'],
			['Lanes', (one) => number(one.lanes), 'number'], ['Members', (one) => number(one.members), 'number'],
		], found.subscriptions, 'No subscriptions.'),
		...table('Kafka sources', [
			['Name', (one) => one.name], ['Topic', (one) => one.topic], ['Into', (one) => one.target],
			['State', state], ['Behind', (one) => lag(one.lag_records)],
		], found.sources, 'No sources.'),
		...table('Kafka sinks', [
			['Name', (one) => one.name], ['From', (one) => toEvents(one.collection)], ['Topic', (one) => one.topic],
			['State', state], ['Behind', (one) => lag(one.lag_events)],
		], found.sinks, 'No sinks.'));
}

async function showOverview() {
	const refresh = async () => {
		if (!document.hidden) await attempt(refreshOverview);
		if (address().view === 'overview') overview.timer = setTimeout(refresh, REFRESH_MS);
	};
	clearTimeout(overview.timer);
	await refresh();
}

// ---- stores ------------------------------------------------------------------------

const browsed = { question: 0, last: null };

function keyButton({ key, value }) {
	return make('li', {}, make('button', { type: 'button', 'data-key': key, onclick: () => go('stores', { ...searched(), key }) },
		make('span', {}, key || '(the empty key)'), make('span', { class: 'dim mono' }, value)));
}

const searched = () => ({ store: $('store').value, prefix: $('prefix').value });

async function showKeys(after) {
	const question = ++browsed.question;
	const { keys, more } = await get('/api/keys', { ...searched(), after });
	if (question !== browsed.question) return; // another one was asked meanwhile
	if (!after) $('keys').replaceChildren();
	$('keys').append(...keys.map(keyButton));
	browsed.last = keys.at(-1)?.key;
	$('more').hidden = !more;
	document.querySelector('#stores .empty').hidden = $('keys').children.length > 0;
}

function historyRow(event) {
	return make('tr', {},
		make('td', { class: 'number' }, event.version), make('td', {}, timeOf(event.created_at)),
		make('td', {}, typeOf(event.type)), make('td', { class: 'mono' }, event.data ?? event.body ?? ''));
}

async function showKey(key) {
	const { current, history, changelog, refused } = await get('/api/key', { store: $('store').value, key });
	const reason = refused ?? (changelog ? 'No changes are kept.' : 'This store has no changelog.');
	$('value').replaceChildren(
		make('div', { class: 'current' },
			make('h2', {}, key || '(the empty key)'),
			current ? make('p', { class: 'dim' }, `version ${current.version}, `, timeOf(current.updated_at))
				: make('p', { class: 'dim' }, 'This key holds nothing now.'),
			current && make('pre', {}, current.value)),
		make('h3', {}, changelog ? 'History, the newest first' : 'History'),
		history.length === 0 ? make('p', { class: 'empty' }, reason)
			: make('table', { id: 'history' }, make('tbody', {}, ...history.map(historyRow))));
	for (const button of $('keys').querySelectorAll('button')) {
		if (button.dataset.key === key) button.setAttribute('aria-current', 'true');
		else button.removeAttribute('aria-current');
	}
}

async function showStores(parameters) {
	const { stores } = await get('/api/overview');
	const before = $('stores').dataset.shown;
	fill($('store'), stores.map((one) => one.store), parameters.get('store'));
	if (!$('store').value) {
		notice('There is no store that this role may read.');
		return;
	}
	if (document.activeElement !== $('prefix')) $('prefix').value = parameters.get('prefix') ?? '';
	const shown = String(query(searched()));
	if (before !== shown) await showKeys();
	$('stores').dataset.shown = shown;
	if (parameters.has('key')) await showKey(parameters.get('key'));
}

// ---- the page ----------------------------------------------------------------------

const views = { events: showEvents, overview: showOverview, stores: showStores };

async function show() {
	const { view, parameters } = address();
	const chosen = view in views ? view : 'events';
	notice();
	if (chosen !== 'events') stop();
	for (const name of Object.keys(views)) $(name).hidden = name !== chosen;
	for (const link of document.querySelectorAll('nav a')) {
		if (link.dataset.view === chosen) link.setAttribute('aria-current', 'page');
		else link.removeAttribute('aria-current');
	}
	await attempt(() => views[chosen](parameters));
}

async function showSession() {
	const { session } = await get('/api/overview');
	$('session').textContent = `${session.role} in ${session.database}`;
}

$('filter').addEventListener('submit', (submit) => {
	submit.preventDefault();
	const tag = $('tag').value.trim();
	$('tag').value = '';
	if (tag) addTag(tag);
	else goFiltered({});
});
$('collection').addEventListener('change', () => goFiltered({}));
$('type').addEventListener('change', () => goFiltered({}));
$('pause').addEventListener('click', pause);
$('older').addEventListener('click', () => attempt(showOlder));
$('search').addEventListener('submit', (submit) => submit.preventDefault());
$('store').addEventListener('change', () => go('stores', { store: $('store').value }));
$('prefix').addEventListener('input', () => go('stores', searched()));
$('more').addEventListener('click', () => attempt(() => showKeys(browsed.last)));
addEventListener('hashchange', show);
// A page that was left may be kept, with its connection, in case one goes back to it.
addEventListener('pagehide', stop);
addEventListener('pageshow', (event) => event.persisted && show());
show();
attempt(showSession);
