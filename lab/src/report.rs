//! How the lab's tables look.

use std::io::{IsTerminal, stdout};

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;

/// Marks what holds.
pub(super) const GOOD: &str = "✓";
/// Marks what does not.
pub(super) const BAD: &str = "✗";

/// An empty table with this header.
pub(super) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED.with_rounded_corners());
    table.set_header(header);
    table
}

/// Colours the marks, if standard output is a terminal that may have colours.
pub fn paint(text: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !stdout().is_terminal() {
        return text.to_owned();
    }
    text.replace(GOOD, &format!("\x1b[32m{GOOD}\x1b[0m"))
        .replace(BAD, &format!("\x1b[1;31m{BAD}\x1b[0m"))
}
