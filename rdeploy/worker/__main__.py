"""`python -m rdeploy.worker JOB.json`: how a child process is started, without loading the command line's packages."""

import os
import sys

from rdeploy.worker import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
# The result is on disk: what vendors' libraries do while the interpreter is torn down (crash, hang) must not matter.
os._exit(code)
