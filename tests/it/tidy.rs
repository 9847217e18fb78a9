//! The architecture as a test: what `docs/architecture.md` says must not exist does not.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let mut found = Vec::new();
    let mut folders = vec![root];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty(), "{dir} holds sources");
    found
}

/// The text without its tests, which may do what they like.
fn without_tests(text: &str) -> &str {
    text.split("\nmod tests {").next().unwrap_or(text)
}

fn is_test_file(path: &Path) -> bool {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let in_tests_folder = path.components().any(|part| part.as_os_str() == "tests");
    in_tests_folder || ["tests", "testing", "faulty", "sim", "loom_tests"].contains(&&*name)
}

fn assert_absent(dir: &str, words: &[&str], except: &[&str]) {
    for (path, text) in sources(dir) {
        let is_excepted = except.iter().any(|allowed| path.ends_with(allowed));
        if is_excepted || is_test_file(&path) {
            continue;
        }
        for (number, line) in without_tests(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for word in words {
                assert!(!code.contains(word), "{}:{}: {word}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn admission_and_log_do_not_know_each_other() {
    assert_absent("src/admission", &["crate::wal", "crate::flush", "crate::journal"], &[]);
    assert_absent("src/wal", &["crate::admission", "crate::flush", "crate::journal"], &[]);
}

#[test]
fn flushers_never_see_a_counter() {
    for dir in ["src/delivery", "src/flush", "src/journal", "src/sink", "src/snapshot"] {
        assert_absent(dir, &["crate::admission", "crate::engine"], &[]);
    }
}

#[test]
fn sinks_know_nothing_of_the_engine() {
    let others = ["crate::delivery", "crate::flush", "crate::journal", "crate::storage"];
    assert_absent("src/sink", &others, &[]);
}

/// All of the library but the ways out of the process.
const DIRS: [&str; 9] =
    ["admission", "delivery", "engine", "flush", "journal", "model", "recovery", "snapshot", "wal"];

#[test]
fn the_ways_out_of_the_process_are_few() {
    let files = ["std::fs", "File::open", "OpenOptions"];
    let except = ["storage/real.rs", "config/file.rs"];
    for dir in DIRS {
        assert_absent(&format!("src/{dir}"), &files, &except);
    }
    for dir in DIRS {
        assert_absent(&format!("src/{dir}"), &["Instant::now", "SystemTime::now"], &[]);
    }
}

#[test]
fn unsafe_code_stands_where_it_is_said_to() {
    let except = [
        "wal/region.rs",
        "wal/crc.rs",
        "admission/bias.rs",
        "admission/word.rs",
        "admission/shared.rs",
        "src/prefetch.rs",
    ];
    assert_absent("src", &["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"], &except);
}

/// Who reads a shard past its lock is waited for by `bias` and by nobody else.
#[test]
fn shards_are_written_to_through_the_bias() {
    assert_absent("src/admission", &[".write()"], &["admission/bias.rs"]);
    let past_the_bias = ["insert", "remove", "entry", "get_mut", "retain", "iter_mut", "clear"];
    let past_the_bias = past_the_bias.map(|method| format!("self.map.{method}("));
    let past_the_bias: Vec<_> = past_the_bias.iter().map(String::as_str).collect();
    assert_absent("src/admission", &past_the_bias, &[]);
}

#[test]
fn files_stay_small_and_comments_narrow() {
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        let lines = text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
        // Code is wrapped by rustfmt, which leaves comments alone.
        let is_long =
            |line: &str| line.trim_start().starts_with("//") && line.chars().count() > 100;
        let long = text.lines().position(is_long);
        assert_eq!(long, None, "{} has a comment above 100 columns", path.display());
    }
}

#[test]
fn no_test_is_ignored() {
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        let marker = ["#[", "ignore"].concat();
        assert!(!text.contains(&marker), "{}", path.display());
    }
}
