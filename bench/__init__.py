"""What is fast, what is not, and how fast it could be.

Here is what is typed. The suite: `conftest.py`, `test_*.py`. Without a GPU: `offline`, `roofline`; and of results,
`regressions`, `runs`, `nights`. On a GPU: `first_light.sh`, `first_runs.sh`, `gpu_tests`, `ceilings`, `profile`. In
`suite/` is what the suite's cases are made of, in `offline/` what reads compiled code.
"""

from prepare.arguments import begin

begin()
