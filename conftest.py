"""For every test: GPU tests skip where there is no GPU, and tiny models run on one thread, where they are fastest.

Under pytest-xdist the tests of some files share a worker, and with it what their modules prepare; these groups and the slow
tests come first, so that no worker is left with one of them at the end. (The marker `xdist_group` of xdist 3.8 has no effect
under pytest 9.2.)

`pytest --benchmark` runs the suites in bench/ instead of the tests; without it none of them is collected.
"""

import gc
import os
from pathlib import Path

import pytest

# Before torch is imported, here and in every process of a test: threads that wait must not take the cores of other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

BENCH = Path(__file__).parent / "bench"
# Files whose module fixtures are dear, by the group whose tests run in one worker.
ONE_WORKER = {
    "test_annotate_browser.py": "browser",
    "test_benchmark_option.py": "benchmark",
    "test_cuda_on_cpu.py": "cuda",
    "test_demo.py": "demo",
    "test_distributed.py": "distributed",
    "test_generate_files.py": "generate",
    "test_kernels_path.py": "kernels",
    "test_loop.py": "loop",
    "test_quantised.py": "engines",
    "test_sanitizers.py": "sanitizers",
    "test_sharded.py": "distributed",
}


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmark suites in bench/ instead of the tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            """Tests of one scope run in one worker: those of a group, and every other test by itself."""
            file = nodeid.split("::")[0].rpartition("/")[2]
            return ONE_WORKER.get(file, nodeid)

    return ByGroup(config, log)


def pytest_configure(config):
    if not config.getoption("--benchmark"):
        torch.set_num_threads(1)
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCH)]
    # Reasons of skipped rows are part of the comparison.
    config.option.reportchars += "s"


def pytest_collection_finish():
    """What is imported by now stays: the collections that accelerate asks for need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--benchmark"):
        terminalreporter.write_line(
            "These rows were measured one after the other. Ratios for quoting come from `python -m bench.cpu` and "
            "`python -m bench.gpu`, whose systems take turns."
        )


def pytest_ignore_collect(collection_path, config):
    if BENCH in (collection_path, *collection_path.parents) and not config.getoption("--benchmark"):
        return True


def pytest_collection_modifyitems(items, config):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not config.getoption("--benchmark"):
        items[:] = [item for item in items if BENCH not in item.path.parents]  # a file given by name is not ignored
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
