-- append conditions: every query shape, bounds, retries
SELECT eventstore.create_collection('dcb');
SELECT position FROM eventstore.append_batch('dcb', '[
	{"type": "course.defined", "tags": ["course:c1"]},
	{"type": "student.enrolled", "tags": ["course:c1", "student:s1"]},
	{"type": "student.enrolled", "tags": ["course:c2", "student:s2"]}]');

-- types, tags, both, several items, everything
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": ["course.defined"]}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"tags": ["student:s2"]}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": ["student.enrolled"], "tags": ["course:c1", "student:s1"]}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": ["nothing"]}, {"tags": ["student:s2"]}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": [], "tags": null}]');
-- none of these matches: two tags that no event has together, a type with another's tag
SELECT position FROM eventstore.append('dcb', 'ok', fail_if => '[{"tags": ["course:c1", "student:s2"]}]');
SELECT position FROM eventstore.append('dcb', 'ok', fail_if => '[{"types": ["course.defined"], "tags": ["course:c2"]}]');
-- after is exclusive; the own event above it counts the next time
SELECT position FROM eventstore.append('dcb', 'ok', tags => '{course:c1}', fail_if => '[{"tags": ["course:c1"]}]', after => 2);
SELECT * FROM eventstore.append('dcb', 'ok', tags => '{course:c1}', fail_if => '[{"tags": ["course:c1"]}]', after => 2);
SELECT * FROM eventstore.append('dcb', 'ok', fail_if => '[{"tags": ["course:c1"]}]', after => 1);
SELECT position FROM eventstore.append('dcb', 'ok', fail_if => '[{}]', after => 6);

-- a refused append spends no position
SELECT position FROM eventstore.append('dcb', 'next');

-- a retry with the same ids is recognised where the batch matches its own query
SELECT * FROM eventstore.append('dcb', 'r', tags => '{retry:1}', fail_if => '[{"tags": ["retry:1"]}]', id => '00000000-0000-7000-8000-0000000000aa');
SELECT * FROM eventstore.append('dcb', 'r', tags => '{retry:1}', fail_if => '[{"tags": ["retry:1"]}]', id => '00000000-0000-7000-8000-0000000000aa');
SELECT * FROM eventstore.append('dcb', 'r', tags => '{retry:1}', fail_if => '[{"tags": ["retry:1"]}]', id => '00000000-0000-7000-8000-0000000000ab');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('dcb', '[
	{"type": "a", "id": "00000000-0000-7000-8000-0000000000b1"},
	{"type": "b", "tags": ["retry:2"], "id": "00000000-0000-7000-8000-0000000000b2"}]', fail_if => '[{"tags": ["retry:2"]}]');
SELECT * FROM eventstore.append_batch('dcb', '[
	{"type": "a", "id": "00000000-0000-7000-8000-0000000000b1"},
	{"type": "b", "tags": ["retry:2"], "id": "00000000-0000-7000-8000-0000000000b2"}]', fail_if => '[{"tags": ["retry:2"]}]');

-- with a version as well: the version is looked at first
SELECT version FROM eventstore.append('dcb', 'v', stream => 's', expected_version => 0, fail_if => '[{"types": ["v"]}]');
SELECT * FROM eventstore.append('dcb', 'v', stream => 's', expected_version => 0, fail_if => '[{"types": ["v"]}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('dcb', 'v', stream => 's', expected_version => 1, fail_if => '[{"types": ["v"]}]');
\echo :LAST_ERROR_SQLSTATE

-- what is not a query, and what is not a position
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '{}');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => 'null');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[1]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[null]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"type": ["a"]}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": "a"}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": [null]}]');
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"tags": [1]}]');
SELECT * FROM eventstore.append('dcb', 'x', after => 3);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": ["zzz"]}]', after => -1);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('dcb', 'x', fail_if => '[{"types": ["zzz"]}]', after => 900);
\echo :LAST_ERROR_SQLSTATE

-- the transaction's own events count
BEGIN;
SELECT position > 0 AS ok FROM eventstore.append('dcb', 'own', tags => '{own:1}');
SELECT * FROM eventstore.append('dcb', 'own', fail_if => '[{"tags": ["own:1"]}]');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SELECT position > 0 AS ok FROM eventstore.append('dcb', 'own', fail_if => '[{"tags": ["own:1"]}]');
SELECT eventstore.drop_collection('dcb');
