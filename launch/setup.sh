# Sourced by the other scripts: enters the repository and its .venv, which is made and filled where that is needed.
# Usage: source launch/setup.sh base|dev        dev: with the optional dependencies of that name in pyproject.toml
# VERSIONS=tried (default: those of the last green gate, constraints.txt), newest, or lowest (lowest.txt)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    base) extra="" ;;
    dev) extra="[dev]" ;;
    *) echo "setup: say base or dev, not '${1:-}'" >&2; exit 1 ;;
esac
case "${VERSIONS:-tried}" in
    tried) constraints=launch/constraints.txt ;;
    lowest) constraints=launch/lowest.txt ;;
    newest) constraints=/dev/null ;;
    *) echo "setup: VERSIONS is tried, newest or lowest, not '$VERSIONS'" >&2; exit 1 ;;
esac

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then echo "setup: Python 3.11 or newer is needed, found $(python3 --version 2>&1)" >&2; exit 1; fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian and Ubuntu keep these two modules in a package of their own.
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if [ "$(id -u)" != 0 ]; then echo "setup: run 'sudo apt-get install $package' first" >&2; exit 1; fi
        apt-get update -qq && apt-get install -y -qq "$package"
    fi
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
source .venv/bin/activate

stamp=".venv/installed-$1-$(cat pyproject.toml "$constraints" | sha256sum | cut -c1-16)"
if [ ! -f "$stamp" ]; then
    echo "setup: installing packages (some minutes and 6 GB the first time)"
    if ! pip install -q -c "$constraints" -e ".$extra"; then
        echo "setup: the versions of $constraints cannot be installed here; VERSIONS=newest takes what can" >&2
        exit 1
    fi
    # An index may hold a torch for which there is no torchvision yet; they are compiled against each other.
    if ! python -c 'import torch, torchvision; torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)'; then
        echo "setup: torch and torchvision do not fit together; install a matching pair into .venv and start again" >&2
        exit 1
    fi
    rm -f ".venv/installed-$1-"* && touch "$stamp"
fi
