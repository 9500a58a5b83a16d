"""The controller of a term's weight on a simulated plant, and the goals that it is given."""

import json
import math
import random

import pytest

from consistency_reg.control import Budget, ReferenceCurve, Target, WeightController, make_goal

WEIGHT, LIMIT = 0.15, 3.0


class Plant:
    """Training as the controller sees it: SRP approaches, late, with a lag and noise, what the weight would give.

    ``base`` is SRP without the term; a weight of ``half`` takes 63% of the way from there to 1.
    """

    def __init__(self, base=0.45, half=0.5, lag=50.0, delay=10, noise=0.02, seed=0):
        self.base, self.half, self.lag, self.noise = base, half, lag, noise
        self.weights = [0.0] * (delay + 1)
        self.srp = base
        self.random = random.Random(seed)

    def settled(self, weight):
        return self.base + (1 - self.base) * (1 - math.exp(-weight / self.half))

    def step(self, weight):
        """One optimizer step; -> what a batch measures."""
        self.weights = [*self.weights[1:], weight]
        self.srp += (self.settled(self.weights[0]) - self.srp) / self.lag
        return self.srp + self.random.gauss(0, self.noise)


def run(plant, bound, steps, *, every=5, controller=None, first=0):
    """SRP and weight at every step under control."""
    controller = controller or WeightController(LIMIT, response_steps=100)
    target, srps, weights = Target("srp/m16", bound), [], []
    for step in range(first, first + steps):
        weights.append(WEIGHT * controller.factor)
        measured = plant.step(weights[-1])
        srps.append(plant.srp)
        if step % every == 0:
            controller.observe(step, target.push(step, measured))
    return srps, weights, controller


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("every", [1, 5, 20])
@pytest.mark.parametrize("delay", [0, 20])
@pytest.mark.parametrize("lag", [10, 50, 100])
@pytest.mark.parametrize(("base", "half"), [(0.3, 0.2), (0.3, 0.5), (0.45, 0.2), (0.45, 0.5)])
def test_it_converges_on_a_plant_with_noise_lag_and_delay(base, half, lag, delay, every):
    plant = Plant(base, half, lag, delay)
    bound = base + 0.6 * (plant.settled(LIMIT * WEIGHT) - base)
    srps, weights, _ = run(plant, bound, 1500, every=every)
    assert all(0 <= weight <= LIMIT * WEIGHT for weight in weights)
    assert mean(srps[-300:]) == pytest.approx(bound, abs=0.01)
    assert max(abs(srp - bound) for srp in srps[-300:]) < 0.06
    assert mean([abs(weight - mean(weights[-300:])) for weight in weights[-300:]]) < 0.15 * mean(weights[-300:])


def test_rare_but_exact_measurements_as_of_validation_converge_too():
    plant = Plant(noise=0.002)
    srps, _, _ = run(plant, 0.6, 3000, every=250)
    assert max(abs(srp - 0.6) for srp in srps[-500:]) < 0.01


def test_noise_alone_does_not_drive_the_weight():
    quiet, noisy = (run(Plant(noise=noise, seed=1), 0.6, 1500)[1][-500:] for noise in (0.0, 0.05))
    assert mean(noisy) == pytest.approx(mean(quiet), rel=0.1)
    assert max(noisy) < 2 * mean(quiet)


def test_a_target_that_cannot_be_met_holds_the_weight_at_its_limit_without_winding_up():
    plant = Plant()
    srps, weights, controller = run(plant, 0.95, 3000)
    assert weights[-1] == LIMIT * WEIGHT
    assert srps[-1] < 0.85
    assert controller.stuck_steps > 2000
    srps, weights, controller = run(plant, 0.6, 600, controller=controller, first=3000)  # a bound that can be met
    assert weights[20] < LIMIT * WEIGHT, "the weight turns back at once, however long it stood at the limit"
    assert mean(srps[-100:]) == pytest.approx(0.6, abs=0.02)
    assert controller.stuck_steps == 0


def test_a_target_that_is_met_without_the_term_takes_the_weight_away_and_gives_it_back_when_needed():
    plant = Plant(base=0.7)
    _, weights, controller = run(plant, 0.5, 1000)
    assert weights[-1] == 0
    plant.base = 0.3
    srps, _, _ = run(plant, 0.5, 1000, controller=controller, first=1000)
    assert mean(srps[-200:]) == pytest.approx(0.5, abs=0.01)


def test_a_budget_is_spent_and_not_overspent(tmp_path):
    """Cross-entropy rises over its falling reference with the square of the weight, late."""
    steps = list(range(0, 2000, 10))
    path = tmp_path / "base.json"
    reference = [4 + math.exp(-step / 300) for step in steps]
    path.write_text(json.dumps({"step": steps, "train/ce": reference}))
    budget = make_goal(None, {"ce": 0.005}, path)
    controller, noise, increase, spent = WeightController(LIMIT, 100), random.Random(0), 0.0, []
    for step in range(2000):
        weight = WEIGHT * controller.factor
        increase += (0.2 * weight**2 - increase) / 50
        spent.append(increase)
        if budget.is_comparable(step):
            expected = reference[step // 10]
            measured = expected * (1 + increase + noise.gauss(0, 0.002))
            controller.observe(step, budget.push(step, measured))
    assert mean(spent[-500:]) == pytest.approx(0.005, rel=0.1)
    assert weight == pytest.approx(math.sqrt(0.005 / 0.2), rel=0.3)


def test_it_goes_on_from_its_state():
    straight = run(Plant(), 0.6, 400)[1]
    plant = Plant()
    _, first, controller = run(plant, 0.6, 200)
    again = WeightController(LIMIT, 100)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert first + run(plant, 0.6, 200, controller=again, first=200)[1] == straight


def test_what_a_controller_refuses():
    with pytest.raises(ValueError, match=r"limit must be a finite number >= 1, got 0\.5"):
        WeightController(limit=0.5)
    with pytest.raises(ValueError, match="response_steps must be at least 1, got 0"):
        WeightController(response_steps=0)
    controller = WeightController()
    controller.observe(10, 0.1)
    with pytest.raises(ValueError, match="steps must not go back, got 9 after 10"):
        controller.observe(9, 0.1)
    with pytest.raises(ValueError, match="push must be a finite number, got nan at step 11"):
        controller.observe(11, math.nan)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (({"srp/m16": 0.7}, {"ce": 0.01}, None), "either a target or a budget"),
        (({}, None, None), "target must map one name to a number, got {}"),
        (({"srp/m16": 0.7, "srp/m4": 0.7}, None, None), "target must map one name to a number"),
        (({"srp/m16": "high"}, None, None), "target must map one name to a number"),
        (({"srp": 0.7}, None, None), "target must name srp/m16 .*, got 'srp'"),
        (({"cache/lru_25pct": 0.7}, None, None), "target must name srp/m16"),
        (({"val/ppl": 0.7}, None, None), "target must name srp/m16"),
        (({"srp/m1": 0.7}, None, None), "segment length of at least 2"),
        (({"srp/m16": 70}, None, None), "between 0 and 1, got 70"),
        ((None, {"ce": 0.01}, None), "give both, got budget={'ce': 0.01}, reference=None"),
        ((None, None, "base.csv"), "give both"),
        ((None, {"ce": 0.0}, "base.csv"), "a relative increase > 0, such as 0.005 for 0.5%, got 0.0"),
    ],
)
def test_goals_that_make_no_sense_are_refused(goal, message):
    with pytest.raises(ValueError, match=message):
        make_goal(*goal)


def test_where_a_goal_is_measured():
    assert Target("srp/m16", 0.7).source == "routing"
    assert Target("val/cache/lru_25pct", 0.7).source == "validation"
    assert make_goal(None, {"ce": 0.01}, "base").source == "training"
    assert make_goal(None, {"val_loss": 0.01}, "base").source == "validation"


def test_a_reference_is_a_run_a_csv_or_a_json(tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "metrics-1.csv").write_text("step,train/ce,val/ce\n9,4.5,\n19,4.3,\n19,,4.4\n")
    (run_folder / "metrics.csv").write_text("step,val/ce,train/ce\n29,,4.2\n39,4.0,\n")
    csv, columns = tmp_path / "curve.csv", tmp_path / "curve.json"
    csv.write_text("step,train/ce\n9,4.5\n19,4.3\n29,4.2\n")
    columns.write_text(json.dumps({"step": [9, 19, 29], "train/ce": [4.5, 4.3, 4.2]}))
    for path in (run_folder, csv, columns):
        curve = ReferenceCurve.read(path, "train/ce")
        assert [curve.at(step, interpolate=False) for step in (9, 10, 29, 39)] == [4.5, None, 4.2, None]
    validation = Budget("val/ce", 0.01, run_folder)
    assert validation.push(29, 4.2) == pytest.approx(1), "between its points a curve of validation is interpolated"
    assert not validation.is_comparable(9)


def test_the_last_session_of_a_reference_counts_however_often_it_was_interrupted(tmp_path):
    for number in range(1, 12):
        (tmp_path / f"metrics-{number}.csv").write_text(f"step,train/ce\n9,{number}.5\n")
    assert ReferenceCurve.read(tmp_path, "train/ce").values == [11.5]
    (tmp_path / "metrics.csv").write_text("step,train/ce\n9,4.5\n")
    assert ReferenceCurve.read(tmp_path, "train/ce").values == [4.5]


def test_what_is_no_reference_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no metrics\.csv"):
        ReferenceCurve.read(tmp_path, "train/ce")
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        ReferenceCurve.read(tmp_path / "no.csv", "train/ce")
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,2.0\n")
    with pytest.raises(ValueError, match="must hold step and train/ce, it holds loss, step"):
        ReferenceCurve.read(other, "train/ce")
    other.write_text("step,train/ce\n1,nan\n")
    with pytest.raises(ValueError, match="finite numbers > 0"):
        ReferenceCurve.read(other, "train/ce")
    broken = tmp_path / "broken.json"
    for content in ("[", "[1, 2]", '{"step": [1], "train/ce": [1.0, 2.0]}'):
        broken.write_text(content)
        with pytest.raises(ValueError, match="a JSON that maps names to lists of one length"):
            ReferenceCurve.read(broken, "train/ce")
