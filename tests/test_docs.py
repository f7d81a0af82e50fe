"""The documentation says what is there: links, names, excerpts, flags, commands. And it is short."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import textwrap

import pytest
from conftest import ROOT, SCRIPTS, SHORT, flags, run
from test_scripts import definitions

LIMITS = {  # words outside code blocks and tables
    "README.md": 1300,
    "CHANGELOG.md": 400,
    "CONTRIBUTING.md": 300,
    "benchmarks/README.md": 2500,
    "docs/README.md": 200,
    "docs/environments.md": 1100,
    "docs/ppo.md": 1800,
    "docs/dqn.md": 900,
    "docs/debugging.md": 1300,
    "docs/copying.md": 700,
    "docs/exercises.md": 650,
    "docs/running.md": 600,
    "docs/differences.md": 800,
    "docs/tuning.md": 700,
}
FIELD = r"(?m)^    (\w+): .*? = (.*?)  # (.*)$"  # of a class Args: its name, default and meaning
PAGES = [*LIMITS, "benchmarks/notebook.md"]
FOREIGN = {  # flags of other programs, and CleanRL's that are not here
    *"--capture-video --save-model --upload-model --hf-entity".split(),
    *"--env --help --nproc-per-node --nnodes --node-rank --master-addr --master-port --logdir".split(),
}


def names_in(file):
    """The functions and classes of a Python file: name -> source."""
    source, names = (ROOT / file).read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = ast.get_source_segment(source, node, padded=True)
    return names


def without_code(text):
    return re.sub(r"(?ms)^```.*?^```", "", text)


def blocks(page, *languages):
    """The code blocks of a page in one of these languages."""
    return re.findall(rf"(?ms)^```(?:{'|'.join(languages)})\n(.*?)^```", (ROOT / page).read_text())


def anchors(page):
    """Where a link into the page can lead, as code hosts name headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_code(page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_has_a_limit_and_is_linked():
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")} <= set(LIMITS)
    contents = (ROOT / "docs/README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in contents


@pytest.mark.parametrize("page", LIMITS)
def test_pages_are_short(page):
    lines = without_code((ROOT / page).read_text()).splitlines()
    words = " ".join(line for line in lines if not line.startswith("|")).split()
    assert len(words) <= LIMITS[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", without_code((ROOT / page).read_text())):
        if "://" in target:
            continue
        target, _, anchor = target.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}#{anchor}"
        name = label.strip("`")
        if path.suffix == ".py" and name != path.name and not name.endswith(".py"):
            assert name in names_in(path.resolve().relative_to(ROOT)), f"{page}: {target} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_are_the_text_of_the_file(page):
    excerpts = [re.fullmatch(r"(?s)# (\w+\.py): (\w+)\n(.*)", block) for block in blocks(page, "python")]
    assert any(excerpts) or page not in ("docs/ppo.md", "docs/dqn.md")
    for file, name, excerpt in [match.groups() for match in excerpts if match]:
        assert excerpt in names_in(file)[name] + "\n", f"{page}: {file} has no such lines in {name}:\n{excerpt}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = set(FOREIGN)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        for name in re.findall(
            r"(?m)^    (\w+): [\w.]+.*  # |^    (\w+): .* = |(?<=[(, ])(\w+): \w+ = ", file.read_text()
        ):
            known.add(f"--{''.join(name).replace('_', '-')}")
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / page).read_text()))
    assert used <= known | {"--script"}, f"{page}: {sorted(used - known)}"


def test_the_table_of_flags_is_that_of_the_scripts():
    """Every flag in the order of the scripts, its default in each, and what --help says of it."""
    defaults, meanings = {}, {}
    for script in SCRIPTS:
        for name, default, meaning in re.findall(FIELD, definitions(f"{script}.py")["Args"]):
            shown = "the file's name" if name == "exp_name" else default.strip('"')
            defaults.setdefault(name, {})[script] = shown
            meanings.setdefault(name, []).append(meaning)
    table = []
    for name, meaning in meanings.items():
        cells = " | ".join(defaults[name].get(script, "") for script in SCRIPTS)
        others = {"env_id": "Atari", "total_timesteps": "DQN", "num_envs": "DQN"}  # that mean something else by it
        text = f"{meaning[0]}; {others[name]}: {meaning[-1]}" if name in others else meaning[0]
        table.append(f"| `--{name.replace('_', '-')}` | {cells} | {text} |")
    evaluation = [
        f"| `--{name.replace('_', '-')}` | {default} | {meaning} |"
        for name, default, meaning in re.findall(FIELD, definitions("evaluate.py")["Args"])
    ]
    for lines in (table, evaluation):
        lines = "\n".join(lines)
        assert lines in (ROOT / "docs/running.md").read_text(), f"It should be:\n{lines}"


def test_the_numbers_of_lines_are_those_of_the_files():
    """In the README's table: to the end of train, and of the whole file."""
    readme = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        (train,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == "train"]
        assert f"| [`{script}.py`]({script}.py) | {train.end_lineno} | {len(source.splitlines())} |" in readme
    length = len((ROOT / "evaluate.py").read_text().splitlines())
    assert f"| [`evaluate.py`](evaluate.py) | | {length} |" in readme


def commands(page):
    """The lines of the shell blocks of a page, but those with a comment that says how many minutes they take."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.split("  #")[0] for line in lines if not re.search("  # .*minute", line)]
    return [part.strip() for line in lines for part in line.split(" && ")]


def shortened(words):
    """The same command with as few steps as pass through everything."""
    name = words[0].removesuffix(".py")
    if name == "evaluate":
        return words if "--episodes" in words else [*words, "--episodes", "1"]
    short = {"total_timesteps": 1000} if "--resume" in words else SHORT.get(name, SHORT["ppo_cartpole"])
    for flag in {f"--{key.replace('_', '-')}" for key in short} & set(words):
        at = words.index(flag)
        words = words[:at] + words[at + (1 if flag == "--cuda" else 2) :]
    return words + flags(short)


def run_commands(lines, folder):
    """Those of the project's scripts and of copies of them, in order, in a folder of their own. How many were run."""
    for file in [*SCRIPTS, "evaluate"]:
        shutil.copy(ROOT / f"{file}.py", folder)
    count = 0
    for command in lines:
        words = shlex.split(command)
        if words[:1] == ["cp"]:
            shutil.copy(folder / words[1], folder / words[2])
        elif re.match(r"python \w+\.py", command):
            done = run(folder / words[1], *shortened(words[1:])[1:], cwd=folder)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            count += 1
    return count


@pytest.mark.parametrize("page", [page for page in PAGES if page != "benchmarks/notebook.md"])
def test_every_shell_block_can_be_pasted(page):
    for block in blocks(page, "bash"):
        assert "<" not in block, f"{page}: a placeholder in\n{block}"
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, f"{page}: {done.stderr}"


def test_every_command_of_the_readme_runs(tmp_path):
    assert run_commands(commands("README.md"), tmp_path) >= 11


@pytest.fixture
def parking(tmp_path):
    """A folder with the environment of the docs in it."""
    (block,) = [block for block in blocks("docs/environments.md", "python") if block.startswith("# parking_env.py")]
    (tmp_path / "parking_env.py").write_text(block)
    return tmp_path


def test_every_command_of_the_docs_runs(parking):
    """The environment in the docs passes Gymnasium's checker, too."""
    check = """
        import gymnasium as gym, parking_env
        from gymnasium.utils.env_checker import check_env
        check_env(gym.make("parking_env:Parking-v0").unwrapped, skip_render_check=True)
        """
    (parking / "check.py").write_text(textwrap.dedent(check))
    done = run(parking / "check.py", cwd=parking)
    assert done.returncode == 0, done.stderr
    lines = [command for page in LIMITS if page.startswith("docs/") for command in commands(page)]
    assert run_commands(lines, parking) >= 9


def test_the_environment_of_the_docs_is_learned(parking):
    """As a user would: the block saved beside the script, trained, scored. Random play has -1.45, parking well 0.8."""
    for file in ("ppo_cartpole.py", "evaluate.py"):
        shutil.copy(ROOT / file, parking)
    arguments = ["--env-id", "parking_env:Parking-v0", "--total-timesteps", 20_000, "--run-dir", "run"]
    done = run(parking / "ppo_cartpole.py", *arguments, cwd=parking)
    assert done.returncode == 0, done.stderr
    done = run(parking / "evaluate.py", "run", "--greedy", "--json", "score.json", cwd=parking)
    assert done.returncode == 0, done.stderr
    assert json.loads((parking / "score.json").read_text())["mean_return"] > 0.6


def test_a_trained_policy_acts_in_other_code(tmp_path):
    """The lines of the docs, on a checkpoint that is made first."""
    (block,) = [block for block in blocks("docs/running.md", "python") if "import torch" in block]
    shutil.copy(ROOT / "ppo_cartpole.py", tmp_path)
    arguments = flags(SHORT["ppo_cartpole"] | {"run_dir": "runs/cartpole"})
    assert run(tmp_path / "ppo_cartpole.py", *arguments, cwd=tmp_path).returncode == 0
    (checkpoint,) = sorted(tmp_path.glob("runs/cartpole/checkpoints/*.pt"))[-1:]
    block = block.replace("000000080128.pt", checkpoint.name) + "assert actions.shape == (1,)\n"
    (tmp_path / "mine.py").write_text(block)
    done = run(tmp_path / "mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
