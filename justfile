# Everything a contributor runs. `just` lists it.

_default:
    @just --list

# What has to hold before a commit: format, lints, docs, tests
check: lint test

# Format and lints, without running anything
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# The whole test suite; installs what is missing
test:
    tests/run

# Backup, two incrementals, restore and comparison of a real guest
demo:
    integrations/demo/run

# Licences, advisories and sources of the dependencies (needs cargo-deny)
deny:
    cargo deny check

# Write the committed schema anew
schema:
    UPDATE_SCHEMA=1 cargo test -p qemu-fleece-protocol --locked schema
