-- The questions, the same of each candidate.
-- psql variables: candidate, events, runs

SELECT :events / 2 AS middle, :events - 1000 AS near_end, :events * 9 / 10 AS last_tenth,
	'customer:' || bench.spread(:events / 3, 3, :events / 20) AS some_customer,
	'order:' || :events / 7 AS some_order \gset

CALL bench.ask(:'candidate', '1. a tag on five events: all',
	candidate.question('{rare:1}'), :runs);
CALL bench.ask(:'candidate', '2. a tag on some 20 events, all over the log: all',
	candidate.question(ARRAY[:'some_customer']), :runs);
CALL bench.ask(:'candidate', '3. a tag on 5 neighbours: the newest',
	candidate.question(ARRAY[:'some_order'], max_count => 1, backward => true), :runs);
CALL bench.ask(:'candidate', '4. a tag on 30 %: the first 10 after the middle',
	candidate.question('{region:eu}', after => :middle, max_count => 10), :runs);
CALL bench.ask(:'candidate', '5. a tag on 30 %: all',
	candidate.question('{region:eu}'), :runs);
CALL bench.ask(:'candidate', '6. two tags, each on 10 %, both on three events: all three',
	candidate.question('{channel:web,campaign:may}'), :runs);
CALL bench.ask(:'candidate', '7. two tags on 30 % and 20 events: the newest',
	candidate.question(ARRAY['region:eu', :'some_customer'], max_count => 1, backward => true), :runs);
CALL bench.ask(:'candidate', '8. one of two types and a tag on 10 %: the first 100 after the middle',
	candidate.question('{channel:web}', types => '{type3,type12}', after => :middle, max_count => 100), :runs);
CALL bench.ask(:'candidate', '9. a condition, a type and a tag on 20 events: any among the last 1,000?',
	candidate.question(ARRAY[:'some_customer'], types => '{type3}', after => :near_end, max_count => 1), :runs);
CALL bench.ask(:'candidate', '10. a condition, the two tags of 6: any in the last tenth?',
	candidate.question('{channel:web,campaign:may}', after => :last_tenth, max_count => 1), :runs);
CALL bench.ask(:'candidate', '11. a condition, a tag that does not occur: any in the whole log?',
	candidate.question('{nobody:0}', max_count => 1), :runs);
