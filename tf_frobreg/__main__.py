"""`python -m tf_frobreg` is the command `tf-frobreg`."""

import sys

from tf_frobreg.cli import main

sys.exit(main())
