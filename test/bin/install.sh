# shellcheck shell=bash
# What a test of programs in other languages needs; sourced by test/drivers/run and
# test/checks/web.
#
#   need CHECK PACKAGE…             Debian's packages, where the check fails; of "a|b" the
#                                   first one that this Debian has
#   install_python FOLDER LIST      a Python with the packages of a list, whose hashes must agree

# One that only others name has no candidate.  Where the lists are old or empty
# nothing is known yet, and so the last one is taken.
known_package()
{
	local package
	for package in ${1//|/ }; do
		! apt-cache policy "$package" 2>/dev/null | grep 'Candidate: [^(]' >/dev/null || break
	done
	echo "$package"
}

need()
{
	local check=$1 package packages=()
	shift
	! eval "$check" >/dev/null 2>&1 || return 0
	if [ "$EUID" -ne 0 ]; then
		echo "missing; as root: apt-get install -y --no-install-recommends ${*//|/ or }"
		return 1
	fi
	apt-get update || true
	for package in "$@"; do
		packages+=("$(known_package "$package")")
	done
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
	eval "$check"
}

install_python()
{
	local venv=$1 list=$2
	need "python3 -c 'import ensurepip'" python3 python3-venv
	! cmp -s "$list" "$venv/requirements.txt" || return 0
	python3 -m venv --clear "$venv"
	"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$list"
	cp "$list" "$venv/"
}
