//! The `scansentry` command.

fn main() {}
