import io
import sys
from pathlib import Path

import pytest

from carillon.engine.config import UserError
from carillon.engine.data.sets.programs import find_program, run_program, stream_program


def python(code: str) -> list[str | Path]:
    return [sys.executable, "-c", code]


def test_a_missing_program_is_asked_for_by_its_package() -> None:
    with pytest.raises(UserError, match=r"no-such-program was not found.*apt-get install x-tools"):
        find_program("no-such-program", "x-tools")


def test_what_a_program_writes_is_returned() -> None:
    code = "import sys; sys.stdout.write(sys.stdin.read().upper())"
    assert run_program(python(code), stdin=b"words", timeout_s=60) == b"WORDS"


def test_a_failing_program_is_quoted() -> None:
    with pytest.raises(UserError, match=r"failed \(3\): what was wrong"):
        run_program(
            python("import sys; print('what was wrong', file=sys.stderr); sys.exit(3)"),
            timeout_s=60,
        )


def test_a_stream_ends_at_its_limits() -> None:
    out = io.BytesIO()
    stream_program(python("print('x' * 3_000_000)"), out, max_bytes=4 << 20, timeout_s=60)
    assert len(out.getvalue()) == 3_000_001
    endless = "while True: print('x' * 100_000)"
    with pytest.raises(UserError, match="wrote more than 2 MB"):
        stream_program(python(endless), io.BytesIO(), max_bytes=2 << 20, timeout_s=60)
    with pytest.raises(UserError, match=r"took longer than 0\.5 s"):
        stream_program(
            python("import time; time.sleep(100)"), io.BytesIO(), max_bytes=100, timeout_s=0.5
        )
    failing = "import sys; sys.stderr.write('so it is'); sys.exit(2)"
    with pytest.raises(UserError, match=r"failed \(2\): so it is"):
        stream_program(python(failing), io.BytesIO(), max_bytes=100, timeout_s=60)
