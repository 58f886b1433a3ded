"""Commands in a fresh process that lacks some modules."""

from __future__ import annotations

import json
import subprocess
import sys

#: Runs commands (JSON in the first argument) where the modules of the second cannot be imported; tells each one's code.
WITHOUT = """
import contextlib, io, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(sys.argv[2]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from dist_ckpt_mistral.cli.main import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(command)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), sorted(sys.modules)]))
"""


def without(modules: list[str], commands: list[list[str]]) -> list[tuple[int, str, set[str]]]:
    """Exit code, output and imported modules after each of some commands, in a fresh process that lacks ``modules``."""
    arguments = [json.dumps(commands), json.dumps(modules)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return [(code, out, set(names)) for code, out, names in map(json.loads, done.stdout.splitlines())]
