"""``python -m bqnn.cli``: the command bqnn."""

from bqnn.cli.main import main

raise SystemExit(main())
