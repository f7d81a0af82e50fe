"""The documentation says what is there: links, names, excerpts, flags, commands."""

import ast
import re
import shutil
import textwrap

import pytest
from conftest import ROOT, SHORT, flags, run
from test_scripts import commands, run_commands

PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
FOREIGN = {  # flags of other programs, and CleanRL's that are not here
    *"--capture-video --save-model --upload-model --hf-entity".split(),
    *"--help --nproc-per-node --nnodes --node-rank --master-addr --master-port --array --wrap --logdir".split(),
}


def names_in(file):
    """The functions and classes of a Python file: name -> source."""
    source, names = (ROOT / file).read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = ast.get_source_segment(source, node, padded=True)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)\)", text):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target
        assert path.exists(), f"{page} links to {target}"
        name = label.strip("`")
        if path.suffix == ".py" and name != path.name and not name.endswith(".py"):
            assert name in names_in(path.resolve().relative_to(ROOT)), f"{page}: {target} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_are_the_text_of_the_file(page):
    blocks = re.findall(r"(?ms)^```python\n# (\w+\.py): (\w+)\n(.*?)^```", (ROOT / page).read_text())
    assert blocks or page not in ("docs/ppo.md", "docs/dqn.md")
    for file, name, excerpt in blocks:
        assert excerpt in names_in(file)[name] + "\n", f"{page}: {file} has no such lines in {name}:\n{excerpt}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = set(FOREIGN)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        for name in re.findall(r"(?m)^    (\w+): .* = |(?<=[(, ])(\w+): \w+ = ", file.read_text()):
            known.add(f"--{(name[0] or name[1]).replace('_', '-')}")
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / page).read_text()))
    assert used <= known | {"--script"}, f"{page}: {sorted(used - known)}"


def test_every_command_of_the_docs_runs(tmp_path):
    """Those without a comment that says how many minutes they take. The environment in the docs passes the checker."""
    page = (ROOT / "docs/environments.md").read_text()
    (block,) = re.findall(r"(?ms)^```python\n(# parking_env\.py.*?)^```", page)
    (tmp_path / "parking_env.py").write_text(block)
    check = """
        import gymnasium as gym, parking_env
        from gymnasium.utils.env_checker import check_env
        check_env(gym.make("parking_env:Parking-v0").unwrapped, skip_render_check=True)
        """
    (tmp_path / "check.py").write_text(textwrap.dedent(check))
    done = run(tmp_path / "check.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [command for page in PAGES if page.startswith("docs/") for command in commands(page)]
    assert len(found) >= 3
    run_commands(found, tmp_path)


def test_a_copy_for_other_pixels_runs(tmp_path):
    """ppo_atari.py with the block of the docs in place of its games, on what CartPole renders."""
    (block,) = re.findall(r"(?ms)^```python\n(def make_envs.*?)^```", (ROOT / "docs/copying.md").read_text())
    source = (ROOT / "ppo_atari.py").read_text()
    games = source[source.index("class AtariGames") : source.index("# ---- Refusals ----")]
    source = source.replace(games, f"{block}\n\n\n").replace(
        "import AutoresetMode", "import SyncVectorEnv, AutoresetMode"
    )
    (tmp_path / "pixels.py").write_text(source)
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    arguments = flags(SHORT["ppo_atari"] | {"env_id": "CartPole-v1", "run_dir": "run"})
    for command in (["pixels.py", *arguments], ["evaluate.py", "run", "--episodes", "1"]):
        done = run(tmp_path / command[0], *command[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
