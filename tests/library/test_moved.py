"""Former import paths work for one release, and say so."""

import pickle
from importlib import import_module

import pytest

from consistency_reg.lab.module import CausalMoE
from consistency_reg.moved import MOVED, ROOT, former_path, present_path


@pytest.mark.parametrize("former", sorted(MOVED))
def test_a_former_path_imports_with_a_warning_that_names_the_new_one(former):
    present = ROOT + MOVED[former]
    with pytest.warns(DeprecationWarning, match=f"{ROOT}{former} has moved to {present};"):
        import_module("consistency_reg.moved").MovedModules().exec_module(module := type(pickle)(ROOT + former))
    for name in (name for name in vars(import_module(present)) if not name.startswith("__")):
        assert getattr(module, name) is getattr(import_module(present), name)


def test_a_class_is_one_class_under_both_paths():
    assert import_module("consistency_reg.lm.module").CausalMoE is CausalMoE


def test_a_pickle_that_names_a_former_path_is_read():
    named = pickle.dumps(CausalMoE, protocol=0).replace(b"consistency_reg.lab.module", b"consistency_reg.lm.module")
    assert pickle.loads(named) is CausalMoE


def test_paths_go_there_and_back():
    for former in MOVED:
        path = f"{ROOT}{former}.Some.name"
        assert former_path(present_path(path)) == path
    assert present_path("consistency_reg.losses") is None
    assert present_path("consistency_reg.lmx") is None
