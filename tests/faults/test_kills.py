"""SIGKILL at random moments: no step beyond the last complete save is lost, and the curve is that of the unharmed run."""

import random
import signal

import pytest
from faults import harness

from dip_jax.errors import Exit

CHANGES = {"train__steps": 60}


def parts(campaign: int) -> list:
    """Seeds: the first for the slow suite, the others for the campaign, each a test of its own."""
    return [pytest.param(seed, marks=pytest.mark.campaign if seed else pytest.mark.slow) for seed in range(campaign + 1)]


@pytest.mark.parametrize("seed", parts(10))
def test_kills_at_random_moments(nursery, config, reference, tmp_path, seed):
    rng = random.Random(seed)
    kills = 10 if seed else 3
    done = runs = 0
    while done < kills:
        workdir, runs = tmp_path / f"run{runs}", runs + 1
        code = None
        while code != Exit.DONE:
            before = harness.steps_of(workdir)
            child = nursery.start(config, workdir)
            if done < kills:
                if rng.random() < 0.8:  # while it trains and saves
                    child.wait_for(lambda child=child: "step " in child.log.replace("from step", ""))
                child.pause(rng.uniform(0, 0.8))
                child.send(signal.SIGKILL)
            code = child.wait()
            assert code in (Exit.DONE, -signal.SIGKILL), child.log
            done += code == -signal.SIGKILL
            if before and "going on" in child.log:
                assert f"going on from step {before[-1]} " in child.log, "a complete save was lost"
            assert "damaged" not in child.log
        harness.check_curve(workdir, reference)
    print(f"{done} kills in {runs} runs: every curve equals the reference")


@pytest.mark.parametrize("seed", parts(3))
def test_kills_while_old_steps_are_deleted(nursery, changed, reference, tmp_path, seed):
    rng = random.Random(seed)
    kills = 7 if seed else 2
    config = changed(checkpoint__keep_last=1)
    workdir, done = tmp_path / "run", 0
    root = workdir / "checkpoints"
    while done < kills:
        child = nursery.start(config, workdir, fault="slow_delete")
        child.wait_for(lambda child=child: (root / "todelete").exists() and "step " in child.log.replace("from step", ""))
        child.pause(rng.uniform(0, 0.3))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.log
        assert "damaged" not in child.log
        done += (root / "todelete").exists()
        assert harness.steps_of(workdir), "the only good step was deleted"
    code, log = nursery.run(config, workdir)
    assert code == Exit.DONE, log
    harness.check_curve(workdir, reference)
    print(f"{done} kills in the middle of a deletion: the curve equals the reference")
