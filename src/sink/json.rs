//! Strings as JSON.

use std::collections::BTreeMap;
use std::fmt;

/// A string.
pub(super) struct JsonText<'a>(pub(super) &'a str);

impl fmt::Display for JsonText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        let mut rest = self.0;
        while let Some(at) = rest.find(|char| matches!(char, '"' | '\\' | '\0'..='\x1f')) {
            let (plain, special) = rest.split_at(at);
            f.write_str(plain)?;
            let mut chars = special.chars();
            match chars.next() {
                Some('"') => f.write_str("\\\"")?,
                Some('\\') => f.write_str("\\\\")?,
                Some(control) => write!(f, "\\u{:04x}", u32::from(control))?,
                None => {}
            }
            rest = chars.as_str();
        }
        f.write_str(rest)?;
        f.write_str("\"")
    }
}

/// An object of strings.
pub(super) struct JsonObject<'a>(pub(super) &'a BTreeMap<String, String>);

impl fmt::Display for JsonObject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (index, (name, value)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", JsonText(name), JsonText(value))?;
        }
        f.write_str("}")
    }
}

/// The string with another character in place of NUL, which databases don't take.
#[cfg(feature = "postgres")]
pub(super) fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
