"""The text that calibration uses when none is given: prose, code, data, dialogue and several languages.

The fit hardly depends on what the text is about (docs/ACCURACY.md); it wants variety and a few thousand tokens.
"""

BUILTIN = r'''
The harbour woke before the town did. Gulls argued over the roofs of the fish hall, a diesel engine coughed twice and
settled into its rhythm, and the first of the boats slid past the breakwater with its lamps still burning. Marta
counted them from the window of the lighthouse as her father had done: eleven out, so eleven must come back. She wrote
the number in the ledger, beside the barometer's reading and the direction of the wind, and only then put water on for
coffee. By noon the sky to the west had turned the colour of slate. "It will pass north of us," said the postman, who
had been wrong about the weather for thirty years. She nodded and went up to clean the glass.

A heat pump moves heat instead of making it. A compressor raises the pressure of a refrigerant vapour, and with it the
temperature; the vapour condenses indoors and gives up its latent heat, expands through a valve, and evaporates again
outdoors at a temperature below that of the air. The ratio of heat delivered to work spent is the coefficient of
performance. For a supply temperature of 308 K and a source of 273 K the Carnot limit is 308 / (308 - 273) = 8.8; real
machines reach 3 to 5, because heat exchangers need a temperature difference and compressors have losses.

def merge_intervals(intervals):
    """Merge overlapping closed intervals; returns a sorted list of disjoint ones."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [tuple(pair) for pair in merged]

class LruCache:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.entries = capacity, {}

    def get(self, key, default=None):
        if key not in self.entries:
            return default
        self.entries[key] = value = self.entries.pop(key)
        return value

#include <stdio.h>
static unsigned gcd(unsigned a, unsigned b) { while (b) { unsigned t = a % b; a = b; b = t; } return a; }
int main(int argc, char **argv) {
    for (unsigned i = 1; i <= 20; i++) printf("%u%c", gcd(i, 36), i == 20 ? '\n' : ' ');
    return 0;
}

{"order": 48213, "customer": {"name": "A. Okafor", "city": "Lagos"}, "items": [{"sku": "KX-2201", "qty": 3, "price":
12.50}, {"sku": "LM-0077", "qty": 1, "price": 240.00}], "paid": true, "note": null, "tags": ["express", "gift"]}

SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS spent FROM customers c JOIN orders o ON o.customer_id = c.id
WHERE o.created_at >= '2024-01-01' GROUP BY c.name HAVING SUM(o.total) > 500 ORDER BY spent DESC LIMIT 10;

User: I have a train at 9:40 and the walk to the station takes 25 minutes. When should I leave if I want to buy a ticket
first, and the queue is usually ten minutes?
Assistant: Add the times up: 25 minutes of walking and 10 of queueing make 35. 9:40 minus 35 minutes is 9:05. I would
leave at 9:00, so that a red light or a slow machine does not cost you the train.
User: And if I cycle? It is three times as fast.
Assistant: Then the way takes a little over 8 minutes. With the queue that is about 18, so leave at 9:20; locking the
bike takes a minute or two as well.

Let f(x) = x^3 - 3x + 1. Then f'(x) = 3x^2 - 3 vanishes at x = 1 and x = -1, with f(-1) = 3 and f(1) = -1, so f has
three real roots. Substituting x = 2 cos t gives 8 cos^3 t - 6 cos t + 1 = 2 cos 3t + 1 = 0, hence cos 3t = -1/2 and
t = 2pi/9, 4pi/9 or 8pi/9. The sum of the roots is 0 and their product is -1, as the coefficients say.

Der Zug hielt auf freier Strecke, und niemand sagte, warum. Draußen lag Schnee auf den Feldern, und in der Ferne
bellte ein Hund. Eine Frau schälte einen Apfel, ein Kind zählte die Masten, und der Schaffner ging zum dritten Mal
vorbei, ohne die Fahrkarten sehen zu wollen.

La boulangère ouvre à six heures, mais l'odeur du pain traverse la place bien avant. Les habitués n'ont pas besoin de
parler : elle leur tend la baguette qu'ils préfèrent, pas trop cuite, et rend la monnaie en souriant.

El río nace en la sierra, cruza tres provincias y muere en el mar. En verano apenas lleva agua; en invierno arrastra
ramas, piedras y, una vez, el puente viejo entero.

今天下午我们去图书馆还书。路上下起了小雨，妹妹忘了带伞，我们只好在车站等了二十分钟。她说：“没关系，正好可以把最后一章看完。”

駅前の古い喫茶店では、朝になると店主が豆を挽く音が聞こえる。常連は新聞を読み、学生は静かに宿題をしている。

Утром мороз усилился, и окна покрылись узорами. Дед принёс дров, растопил печь и поставил чайник; в избе запахло дымом
и хлебом. Внучка сидела у стола и учила наизусть стихотворение.

## Release notes 2.4.0
* `connect()` now takes a `timeout` in seconds (default 30). A negative value raises `ValueError`.
* Fixed: a worker that died while holding the queue's lock left the others waiting for ever (#1182).
* Removed: the `--legacy-auth` flag, deprecated since 2.1. Use `--auth token` instead.

| city      | population | area (km2) | founded |
|-----------|-----------:|-----------:|--------:|
| Bergen    |    291,940 |      464.7 |    1070 |
| Cusco     |    428,450 |      385.1 |    1100 |
| Kanazawa  |    462,479 |      468.8 |    1583 |

The committee shall publish its findings within ninety days of the hearing. Where a member dissents, the dissent shall
be printed with the findings, unless the member asks in writing that it be withheld. Nothing in this section limits the
right of a party to seek review under section 14, provided that the application is made no later than sixty days after
the findings are published and states the grounds on which it rests.

Dear Ms Lindqvist, thank you for your letter of 3 March. The lens you returned has been examined: the coating was
scratched in transit, not in use, and we will replace it at no charge. Please allow two weeks, and keep the receipt.
With apologies for the trouble, J. Farrow, Customer Care.

1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765 10946; 2 3 5 7 11 13 17 19 23 29 31 37 41 43 47 53 59
61 67 71 73 79 83 89 97; 0.5 0.25 0.125 0.0625; -40 C = -40 F; 3.14159265358979; 0xDEADBEEF; 2026-03-29T02:30:00+01:00

Cells keep time without a clock. A protein is made, enters the nucleus, and slowly shuts off the gene that made it; as
it is broken down the gene wakes again, and the cycle takes about a day. Light reaches the loop through a pigment that
speeds the breakdown, which is how a body that has crossed an ocean finds the new morning within a week. Fungi, flies
and people use different proteins for the same trick, and all of them run a little fast or slow when left in the dark.

$ git log --oneline -3
9f1c2ab parser: refuse duplicate keys
41d07e3 docs: explain the retry budget
c8831f0 tests: run the slow ones nightly
$ make -j8 test 2>&1 | grep -E "FAILED|ERROR" || echo clean
clean

"What did you see from the ridge?" asked the captain. "Smoke, sir, but from one chimney only, and no horses in the
yard." He folded the map along its worn creases. "Then they left at dawn, and they left in good order. We are a day
behind, and the bridge at Tarn will not hold the guns." Nobody answered. Somewhere down the line a man was singing.
'''
