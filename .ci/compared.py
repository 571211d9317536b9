"""Checks that README's comparison tells its rules apart: `python compared.py comparison.csv`."""

import csv
import math
import sys
from pathlib import Path

from wmkp.experiments.commands import compare

lines = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
rows = []
for line in lines:
    numbers = {name: float(line[name] or math.nan) for name in compare.Row._fields[3:-1]}
    rows.append(compare.Row(line["rule"], int(line["seed"]), int(line["epoch"]), **numbers))
above = {rule: compare.above_backprop(rows, rule) for rule in ("fa", "ss", "mkp", "wm")}
assert above["fa"] > 3 and above["ss"] > 2, above
assert abs(above["mkp"]) < 2 and abs(above["wm"]) < 2, above
ends = [row for row in rows if row.epoch == rows[-1].epoch and row.rule in {"mkp", "wm"}]
assert ends and all(row.matrix_angle_worst_deg < 2 for row in ends), ends
print(f"standard errors above backprop: {above}")
