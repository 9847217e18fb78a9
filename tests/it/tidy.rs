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

/// The lines, numbered, without those of items that are for tests, which may do what they like, and
/// without comments.
fn library_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut test_item = None;
    (1..).zip(text.lines()).filter_map(move |(number, line)| {
        let (indent, line) = (line.len() - line.trim_start().len(), line.trim());
        if ["#[cfg(test)]", "#[cfg(all(test", "#[cfg(any(test"]
            .iter()
            .any(|cfg| line.starts_with(cfg))
        {
            test_item = Some(indent);
        }
        let Some(item_indent) = test_item else {
            return Some((number, line.split("//").next().unwrap_or_default()));
        };
        let is_end = line.starts_with('}') || [";", ",", "}"].iter().any(|end| line.ends_with(end));
        if indent == item_indent && is_end {
            test_item = None;
        }
        None
    })
}

fn is_test_file(path: &Path) -> bool {
    // Not of the folders that the project lies in.
    let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let in_tests_folder = path.components().any(|part| part.as_os_str() == "tests");
    in_tests_folder || name.ends_with("tests") || ["testing", "faulty", "sim"].contains(&&*name)
}

fn assert_absent(dir: &str, words: &[&str], except: &[&str]) {
    for (path, text) in sources(dir) {
        let is_excepted = except.iter().any(|allowed| path.ends_with(allowed));
        if is_excepted || is_test_file(&path) {
            continue;
        }
        for (number, code) in library_lines(&text) {
            for word in words {
                assert!(!code.contains(word), "{}:{number}: {word}", path.display());
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
fn sinks_know_the_model_errors_and_directories_only() {
    for (path, text) in sources("src/sink") {
        for (_, line) in library_lines(&text) {
            for after in line.split("crate::").skip(1) {
                let known = ["model::", "error::", "directory::"];
                let is_known = known.iter().any(|known| after.starts_with(known));
                assert!(is_known || is_test_file(&path), "{}: {line}", path.display());
            }
        }
    }
}

/// Modules that know one above them, and why.
const UPWARDS: [(&str, &str, &str); 2] = [
    (
        "error",
        "ledger",
        "an error says how a reservation ended, and how many counters one may have",
    ),
    ("storage", "wal", "a storage maps the rings: `wal::region` is the only mapped memory"),
];

/// The rows of the module table in `docs/architecture.md`, from the top down.
fn module_rows() -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let text = fs::read_to_string(path).unwrap();
    let names = |row: &str| {
        let cell = row.split('|').nth(1).unwrap_or_default();
        cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let table = text.split("\n## Modules").nth(1).expect("the table has a heading");
    let lines = table.lines().skip_while(|line| !line.starts_with("| `"));
    lines.take_while(|line| line.starts_with("| `")).map(names).collect()
}

/// What a module knows that stands above it, or in no row: `(line, module)`.
fn known_above<'a>(module: &str, rows: &[Vec<String>], text: &'a str) -> Vec<(usize, &'a str)> {
    let rank = |name: &str| rows.iter().position(|row| row.iter().any(|it| it == name));
    let own = rank(module);
    let mut above = Vec::new();
    for (number, line) in library_lines(text) {
        for after in line.split("crate::").skip(1) {
            let end = after.find(|it: char| !it.is_alphanumeric() && it != '_');
            let known = &after[..end.unwrap_or(after.len())];
            let is_excepted = UPWARDS.iter().any(|&(from, to, _)| (from, to) == (module, known));
            if own.is_none() || rank(known) < own && !is_excepted {
                above.push((number, known));
            }
        }
    }
    above
}

#[test]
fn modules_know_only_what_is_below_them() {
    let (rows, root) = (module_rows(), Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(rows.len() > 10, "{rows:?}");
    for (path, text) in sources("src") {
        let relative = path.strip_prefix(&root).unwrap().with_extension("");
        let module = relative.iter().next().unwrap().to_string_lossy();
        // Another crate, which sees the public API.
        if module == "bin" || is_test_file(&path) || relative.iter().any(|part| part == "sim") {
            continue;
        }
        let above = known_above(&module, &rows, &text);
        assert!(above.is_empty(), "{} knows (line, module): {above:?}", path.display());
    }
}

#[test]
fn who_knows_a_module_above_is_found() {
    let rows = [&["top"][..], &["middle", "beside"], &["low"]];
    let rows = rows.map(|row| row.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
    let text = "use crate::low::Low;\nuse crate::beside;\nlet it = crate::top::it();\n// crate::top\n\
                #[cfg(test)]\nuse crate::top;\nuse crate::unknown::It;";
    assert_eq!(known_above("middle", &rows, text), [(3, "top"), (7, "unknown")]);
}

/// Or the names that are looked for here would not stand behind `crate::`.
#[test]
fn what_is_imported_is_named_in_full() {
    assert_absent("src", &["crate::{"], &[]);
}

#[test]
fn the_ways_out_of_the_process_are_few() {
    let files = ["std::fs", "File::open", "OpenOptions", "rustix::fs"];
    let program = |name: &str| format!("src/bin/tollgate/{name}");
    let [sinks, serve] = ["sinks.rs", "serve.rs"].map(program);
    let except = [
        "storage/real.rs",
        "src/directory.rs",
        "config/file.rs",
        "json_lines/mod.rs",
        "json_lines/scan.rs",
        &sinks,
        &serve,
    ];
    assert_absent("src", &files, &except);
    let [patience, waits, metrics] =
        ["patience.rs", "http/waits.rs", "http/metrics.rs"].map(program);
    let except = ["src/clock.rs", &serve, &patience, &waits, &metrics];
    assert_absent("src", &["Instant::now", "SystemTime::now"], &except);
    let except = ["src/seats.rs", "sync/futex.rs"];
    assert_absent("src", &["rustix::thread"], &except);
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
        "sync/brief.rs",
    ];
    assert_absent("src", &["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"], &except);
}

/// Printing is clippy's to find, and so are `unwrap` and `expect`. What is asserted is so when the
/// library is built, or when it is tested.
#[test]
fn the_library_neither_panics_nor_exits() {
    let words =
        ["panic!(", "unreachable!(", "unimplemented!(", "assert!(", "process::exit", "abort("];
    for (path, text) in sources("src") {
        let is_program = path.to_string_lossy().contains("/src/bin/");
        // The bounds are put together when the library is built.
        let is_excepted = ["fuzzing.rs", "config/bounds.rs"].iter().any(|it| path.ends_with(it));
        if is_test_file(&path) || is_program || is_excepted {
            continue;
        }
        for (number, code) in library_lines(&text) {
            let is_free =
                ["const ", "debug_assert"].iter().any(|free| code.trim_start().starts_with(free));
            let word = words.iter().find(|&&word| !is_free && code.contains(word));
            assert_eq!(word, None, "{}:{number}", path.display());
        }
    }
}

#[test]
fn items_for_tests_are_told_from_the_others() {
    let text = "one(); // a comment\n#[cfg(test)]\nfn two() {\n    three();\n}\nimpl Four {\n    \
                #[cfg(all(test, not(loom)))]\n    five: u8,\n    #[cfg(test)]\n    #[rustfmt::skip]\n    \
                fn six() {\n        seven()\n    }\n    eight: u8,\n}\n#[cfg(test)]\nmod nine;\nten();";
    let kept: Vec<_> = library_lines(text).map(|(number, code)| (number, code.trim())).collect();
    let expected =
        [(1, "one();"), (6, "impl Four {"), (14, "eight: u8,"), (15, "}"), (18, "ten();")];
    assert_eq!(kept, expected);
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

/// Prose that was edited and not wrapped again; tables, code and links to pictures can't be.
#[test]
fn prose_is_wrapped() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let is_prose = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let pages = ["README.md", "CHANGELOG.md"].map(|name| root.join(name));
    let mut code = false;
    for path in docs.filter(is_prose).chain(pages) {
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let start = line.trim_start();
            code ^= start.starts_with("```");
            let is_free = code || ["|", "!["].iter().any(|free| start.starts_with(free));
            let columns = line.chars().count();
            assert!(is_free || columns <= 130, "{}:{number}: {columns} columns", path.display());
        }
        assert!(!code, "{} ends within code", path.display());
    }
}

#[test]
fn no_test_is_ignored() {
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        let marker = ["#[", "ignore"].concat();
        assert!(!text.contains(&marker), "{}", path.display());
    }
}
