import torch

from spice_ray.stages.plateau import WINDOW, Plateau

CPU = torch.device("cpu")


def steps_until_over(shares: list[float], patience: int) -> int | None:
    """Shares of whole windows; the step at which the plateau is told of, if it is."""
    plateau = Plateau(patience, CPU)
    for step in range(1, WINDOW * len(shares) + 1):
        plateau.add(step, torch.tensor(shares[(step - 1) // WINDOW]))
        if plateau.is_over:
            return step
    return None


def test_training_is_over_when_the_share_has_not_grown_for_so_many_steps() -> None:
    assert steps_until_over([0.1, 0.2, 0.2, 0.2], 200) == 4 * WINDOW
    assert steps_until_over([0.1, 0.2, 0.2, 0.2], 100) == 3 * WINDOW
    assert steps_until_over([0.1, 0.2, 0.2, 0.3, 0.3], 200) is None
    assert steps_until_over([0.0, 0.0, 0.0, 0.3, 0.3], 100) == 5 * WINDOW
    assert steps_until_over([0.0] * 9, 100) is None


def test_less_than_a_thousandth_is_no_growth_unless_it_adds_up() -> None:
    assert steps_until_over([0.5, 0.5005, 0.5009], 200) == 3 * WINDOW
    assert steps_until_over([0.5, 0.5006, 0.5012, 0.5018], 200) is None


def test_only_whole_windows_are_looked_at() -> None:
    plateau = Plateau(100, CPU)
    for step in range(1, 2 * WINDOW):
        plateau.add(step, torch.tensor(0.5))
    assert not plateau.is_over
    plateau.add(2 * WINDOW, torch.tensor(0.5))
    assert plateau.is_over


def test_a_plateau_goes_on_from_its_state_in_the_middle_of_a_window() -> None:
    shares = torch.rand(6 * WINDOW, generator=torch.Generator().manual_seed(0)).cumsum(0).clamp_max(120) / 120
    whole, ends = Plateau(200, CPU), []
    for cut in (1, 150, 200, 333):
        first, second = Plateau(200, CPU), Plateau(200, CPU)
        for step in range(1, cut + 1):
            first.add(step, shares[step - 1])
        second.load(first.state())
        for step in range(cut + 1, len(shares) + 1):
            second.add(step, shares[step - 1])
        ends.append(second.state())
    for step in range(1, len(shares) + 1):
        whole.add(step, shares[step - 1])
    for state in ends:
        assert torch.equal(state["figures"], whole.state()["figures"])
        assert torch.equal(state["sum"], whole.state()["sum"])
    assert whole.is_over
