//! Decides which engines this build has (`cfg(litert)`, `cfg(tflite)`), and says where `libLiteRt.so` lies: to the linker
//! now, to the loader later.
//!
//! - Linking: the directory in `LITERT_LIB_DIR` if the environment names one that holds the library, else
//!   `.deps/litert-<version>/<target>` as laid down by `scripts/fetch-litert.sh`.
//! - Loading: `$ORIGIN/../lib/scansentry`, the layout of a package; and for a developer's build the directory above,
//!   so that the binary and every test find the library without `LD_LIBRARY_PATH`. `SCANSENTRY_PACKAGE=1` leaves the
//!   second out: a package must not name a build machine's directories.

use std::env;
use std::path::{Path, PathBuf};

/// The version whose C interface the crate litert-sys has.
const LITERT_VERSION: &str = "2.1.4";
const LIBRARY: &str = "libLiteRt.so";
/// Where there is such a library; Cargo.toml has the same list.
const LITERT_ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LITERT_LIB_DIR");
    println!("cargo::rerun-if-env-changed=SCANSENTRY_PACKAGE");
    println!("cargo::rustc-env=SCANSENTRY_LITERT_VERSION={LITERT_VERSION}");

    println!("cargo::rustc-check-cfg=cfg(litert, tflite)");
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let tflite = env::var_os("CARGO_FEATURE_TFLITE").is_some();
    let litert = env::var_os("CARGO_FEATURE_LITERT").is_some()
        && LITERT_ARCHITECTURES.contains(&arch.as_str());
    if tflite {
        println!("cargo::rustc-cfg=tflite");
    } else if !litert {
        println!(
            "cargo::error=no inference engine for {target}: LiteRT is for {}; build with --features tflite",
            LITERT_ARCHITECTURES.join(" and ")
        );
    }
    if !litert {
        return;
    }
    println!("cargo::rustc-cfg=litert");
    let Some(directory) = library_directory(&target) else {
        return;
    };

    println!(
        "cargo::rerun-if-changed={}",
        directory.join(LIBRARY).display()
    );
    println!("cargo::rustc-link-search=native={}", directory.display());
    println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/scansentry");
    if env::var_os("SCANSENTRY_PACKAGE").is_none_or(|value| value != "1") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", directory.display());
    }
}

/// The directory of the library for `target`; without one the build ends here, with one line that says what to do.
fn library_directory(target: &str) -> Option<PathBuf> {
    let root =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let fetched = root
        .join(".deps")
        .join(format!("litert-{LITERT_VERSION}"))
        .join(target);
    // `.cargo/config.toml` sets LITERT_LIB_DIR to the project itself, which means "not given".
    let given = env::var_os("LITERT_LIB_DIR")
        .map(PathBuf::from)
        .filter(|given| !same_directory(given, &root));

    let hint = if given.is_some() {
        "LITERT_LIB_DIR says so"
    } else {
        "run `make setup`"
    };
    let directory = given.unwrap_or(fetched);
    if directory.join(LIBRARY).is_file() {
        return Some(directory);
    }
    // Watched although absent, so that the next build after `make setup` looks again.
    println!(
        "cargo::rerun-if-changed={}",
        directory.join(LIBRARY).display()
    );
    println!(
        "cargo::error={LIBRARY} for {target} is not in {}; {hint}",
        directory.display()
    );
    None
}

fn same_directory(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
