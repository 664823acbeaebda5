//! Man pages and shell completions out of the command line's own definition, so that they are never stale: `cargo run --example manuals -- DIR`.
//! Made when a package is made (`scripts/deb.sh`); not in the shipped program.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap_complete::Shell;

fn main() -> std::io::Result<()> {
    let dir: PathBuf = std::env::args_os()
        .nth(1)
        .ok_or_else(|| std::io::Error::other("manuals: a directory is expected"))?
        .into();
    std::fs::create_dir_all(&dir)?;
    let mut command = scansentry::cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "scansentry", &dir)?;
    }
    clap_mangen::generate_to(command, &dir)?;
    // One page for each verb is enough; `help` has none of its own.
    for entry in std::fs::read_dir(&dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.contains("-help") {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::write(dir.join("scansentry.toml.5"), config_page())
}

/// The documented configuration, as it is.
fn config_page() -> String {
    let mut page = String::from(
        ".TH scansentry.toml 5 \"\" \"ScanSentry\"\n.SH NAME\nscansentry.toml \\- configuration of scansentry(1)\n.SH FILES\n\
         /etc/scansentry/config.toml, /etc/scansentry/conf.d/*.toml\n.SH SETTINGS\n.nf\n",
    );
    for line in scansentry::config::DEFAULTS.lines() {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        let _ = writeln!(page, "\\&{line}");
    }
    page.push_str(".fi\n.SH SEE ALSO\nscansentry(1)\n");
    page
}
