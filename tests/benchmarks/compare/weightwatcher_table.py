"""WeightWatcher's table as one line of JSON; run by the Python of its environment with BASE and TUNED."""

import sys

import weightwatcher as ww

base, tuned = sys.argv[1:]
details = ww.WeightWatcher(model=tuned, base_model=base).analyze(mp_fit=True)
print()
print(details.to_json(orient="records"))
