"""Tasks that are measured in processes of their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_diag.errors import InputError, UsageError
from lora_diag.running.engines.processes import Processes


def test_process_answers_raises_and_may_end(capfd):
    """``eval`` is the diagnostic: printed text is no result, errors are raised, the end of a process is reported."""
    with Processes(eval, 1) as measure, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(measure, [f"print({i}) or {i}" for i in range(20)])) == list(range(20))
        with pytest.raises(UsageError, match="as it is"):
            measure("(_ for _ in ()).throw(__import__('lora_diag').UsageError('as it is'))")
        with pytest.raises(ZeroDivisionError) as raised:
            measure("1/0")
        assert "in serve" in raised.value.__notes__[0]
        assert measure("__import__('sys').stdin.closed") is False
        with pytest.raises(InputError, match="ended with code 7; run again with --workers 1"):
            measure("__import__('os')._exit(7)")
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(map(int, err.split())) == list(range(20))
