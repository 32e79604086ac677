"""Tasks that are measured in processes of their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_diag.errors import InputError, UsageError
from lora_diag.running.engines.processes import Processes


def test_killed_processes_end_every_call():
    """Also the call that waits for a free process, which ``run_local`` makes if they end one after
    another.
    """
    with Processes(eval, 2) as measure:
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(measure, "__import__('time').sleep(60)") for _ in range(3)]
            for process in measure._started:
                process.kill()
            errors = [type(call.exception(timeout=20)) for call in calls]
        assert errors == [InputError] * 3


def test_process_answers_raises_and_may_end(capfd):
    """``eval`` is the diagnostic: printed text is no result, errors are raised, the end of a
    process is reported.
    """
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
