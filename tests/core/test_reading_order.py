"""A step stays short to read: few named calls, few files, few changes of file along the way."""

from support.count_calls import Figures, calls_of, figures, of_ours, of_torch

MOST = Figures(calls=40, files=6, changes_of_file=16)


def test_a_warm_step_is_short_to_read(cpp):
    calls = of_ours()
    found = figures(calls)
    listing = "\n".join(f"{file} {function}" for file, function in calls)
    assert all(a <= b for a, b in zip(found, MOST, strict=True)), f"{found}\n{listing}"


def test_the_count_sees_the_calls_of_a_step(cpp):
    functions = [function.rpartition(".")[2] for _, function in of_ours()]
    assert functions[0] == "step"
    assert {"take_step", "step_bucket", "log_tune"} <= {*functions}
    assert figures(of_torch()).calls > 0


def test_the_figures_are_those_of_the_sequence(tmp_path):
    names = {}
    for name in ("one", "two"):
        path = tmp_path / f"{name}.py"
        path.write_text("def call(*others):\n    [other() for other in others]\n")
        exec(compile(path.read_text(), str(path), "exec"), names.setdefault(name, {}))
    one, two = names["one"]["call"], names["two"]["call"]
    assert figures(calls_of(lambda: one(two, one, two), tmp_path)) == Figures(4, 2, 3)
