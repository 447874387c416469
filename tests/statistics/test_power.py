import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from stepflow_tl.cli.main import main
from stepflow_tl.errors import ComparisonError
from stepflow_tl.statistics.power import detectable_difference, half_width, mcnemar_power, samples_needed


@pytest.mark.parametrize(("n", "discordant", "difference"), [(1, 0.5, 0.1), (9, 0.8, 0.7), (14, 0.6, -0.5)])
def test_power_is_the_probability_of_all_outcomes_that_reject(n, discordant, difference):
    shares = ((discordant + difference) / 2, (discordant - difference) / 2)
    total = 0.0
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        if gained + lost <= n and (gained + lost == 0 or binomtest(gained, gained + lost).pvalue > 0.2):
            continue
        if gained + lost <= n:
            rest = n - gained - lost
            ways = np.prod(range(1, n + 1)) / np.prod(
                [np.prod(range(1, k + 1), dtype=float) for k in (gained, lost, rest)]
            )
            total += ways * shares[0] ** gained * shares[1] ** lost * (1 - discordant) ** rest
    assert mcnemar_power(n, discordant, difference, alpha=0.2) == pytest.approx(total, abs=1e-9)


def test_the_level_is_kept_and_power_grows_with_the_questions():
    assert mcnemar_power(200, 0.3, 0.0) <= 0.05
    powers = [mcnemar_power(n, 0.3, 0.1) for n in (50, 100, 200, 400)]
    assert powers == sorted(powers) and powers[-1] > 0.9


def test_the_smallest_difference_is_found_with_the_power_asked_for():
    found = detectable_difference(200, 0.3)
    assert mcnemar_power(200, 0.3, found) >= 0.8 > mcnemar_power(200, 0.3, found - 2e-4)
    assert detectable_difference(4, 0.5) is None


def test_the_half_width_is_that_of_simulated_differences():
    rng = np.random.default_rng(0)
    draws = rng.multinomial(300, [0.2, 0.1, 0.7], size=20000)
    spread = np.std((draws[:, 0] - draws[:, 1]) / 300)
    assert half_width(300, 0.3, 0.1) == pytest.approx(1.96 * spread, rel=0.02)


def test_samples_of_a_question_narrow_the_interval_as_much_as_questions_do():
    rng = np.random.default_rng(1)
    right = rng.uniform(0.1, 0.9, size=40)  # questions differ, what is done to them does not
    n_samples = samples_needed(40, float((2 * right * (1 - right)).mean()), 0.1)
    means = rng.binomial(n_samples, right, size=(2, 20000, 40)) / n_samples
    assert 1.96 * np.std((means[0] - means[1]).mean(-1)) == pytest.approx(0.1, rel=0.03)
    assert samples_needed(1000, 0.5, 0.1) == 1
    with pytest.raises(ComparisonError, match="the half width is 0: expected more than 0"):
        samples_needed(10, 0.5, 0)


def test_shares_that_do_not_exist_are_refused(capsys):
    with pytest.raises(ComparisonError, match="a difference no larger than the share"):
        mcnemar_power(10, 0.1, 0.2)
    assert main("power --n 10 --baseline 0.5 --difference 0.9".split()) == 2
    assert "difference 0.9" in capsys.readouterr().err


def test_the_command_prints_hours_from_the_users_rate_alone(capsys):
    words = "power --n 100 --baseline 0.5 --difference 0.1 --discordant 0.3 --tokens 3600 --gpus 2"
    assert main(words.split()) == 2
    assert "go together" in capsys.readouterr().err
    assert main([*words.split(), "--tokens-per-second", "50"]) == 0
    out = capsys.readouterr().out
    assert "hours: 3.0 at 50.0 tokens/s on each of 2 GPUs" in out
    assert f"power for a difference of 0.1: {mcnemar_power(100, 0.3, 0.1):.3f}" in out
    assert main("power --n 100 --baseline 0.5".split()) == 0
    assert "0.500 discordant (answers taken as independent)" in capsys.readouterr().out
    assert (
        main("power --n 60 --baseline 0.5 --half-width 0.05 --tokens 60 --tokens-per-second 1".split()) == 0
    )
    out = capsys.readouterr().out
    assert (
        "samples per question for +-0.05: at least 13\nwith 13 samples per question: at least +-0.0496" in out
    )
    assert "hours: 39.0" in out
