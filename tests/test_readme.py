"""What the README shows runs: its Python blocks here, its two commands in .ci/run."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
    assert blocks, "README.md has no ```python block"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:  # one namespace: a block goes on where the last one ended
        line = TEXT.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(README), "exec"), namespace)


@pytest.mark.parametrize(("marker", "ends_with"), [("demo", "fnreg demo"), ("test", "-m pytest -q -n 2")])
def test_command_is_marked(marker: str, ends_with: str) -> None:
    found = re.findall(rf"^<!-- {marker} -->\n```bash\n(.+)\n```$", TEXT, re.MULTILINE)
    assert len(found) == 1, f"README.md needs one line of bash after <!-- {marker} -->, found {len(found)}"
    assert found[0].startswith("python3 -m venv .venv && ") and found[0].endswith(ends_with)
