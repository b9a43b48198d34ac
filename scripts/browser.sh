#!/usr/bin/env bash
# Install a browser without a screen, in which a test opens the report of a scaling study: scripts/browser.sh
#
# What is there already is left alone. Where this script may not install, it says so and the test that needs it skips.
set -euo pipefail

package=chromium-headless-shell
programs=(chromium-headless-shell chromium chromium-browser google-chrome)

say() { printf '[browser] %s\n' "$*" >&2; }

for program in "${programs[@]}"; do
  if command -v "$program" >/dev/null; then exit 0; fi
done
if ! command -v apt-get >/dev/null; then
  say "the report will not be opened in a browser: this is no Debian or Ubuntu. The test takes one of ${programs[*]}"
  exit 0
fi
as_root=()
if ((EUID != 0)); then
  if ! sudo -n true 2>/dev/null; then
    say "the report will not be opened in a browser: this script may not install. To have it, run"
    say "    sudo apt-get install --no-install-recommends $package"
    exit 0
  fi
  as_root=(sudo -n)
fi
say "installing with apt-get (60 MB, about 30 s): $package"
install=(timeout 300 "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package")
if ! "${install[@]}" >/dev/null 2>&1 && ! { "${as_root[@]}" apt-get update -qq && "${install[@]}" >/dev/null; }; then
  say "the report will not be opened in a browser: apt-get could not install $package (see above)"
fi
