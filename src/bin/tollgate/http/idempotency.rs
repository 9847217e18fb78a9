//! The header `Idempotency-Key`, as in the IETF draft "The Idempotency-Key HTTP Header Field"
//! (draft-ietf-httpapi-idempotency-key-header): a request's id, under which it counts once.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use sha2::{Digest as _, Sha256};

use crate::http::App;
use crate::http::errors::ApiError;

const HEADER: &str = "idempotency-key";
const KEY_BYTES_MAX: usize = 255;

/// The id that a request carries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestKey(pub(crate) Option<u128>);

impl RequestKey {
    /// For operations that can't be answered again: who sends a key believes that they can.
    pub(crate) fn refuse(self) -> Result<(), ApiError> {
        match self.0 {
            None => Ok(()),
            Some(_) => Err(ApiError::bad_idempotency_key(
                "this operation takes no Idempotency-Key: try-consume, consume, record and reserve do",
            )),
        }
    }
}

impl FromRequestParts<Arc<App>> for RequestKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, ApiError> {
        let mut values = parts.headers.get_all(HEADER).iter();
        let Some(value) = values.next() else { return Ok(Self(None)) };
        if values.next().is_some() {
            return Err(ApiError::bad_idempotency_key("more than one Idempotency-Key"));
        }
        match parse(value.as_bytes()) {
            Some(id) => Ok(Self(Some(id))),
            None => Err(ApiError::bad_idempotency_key(
                "an Idempotency-Key is a UUID, 32 hexadecimal digits, or 1 to 255 bytes of ASCII",
            )),
        }
    }
}

/// The id of a key, which may stand between quotes, as a structured field's string does.
fn parse(value: &[u8]) -> Option<u128> {
    let unquoted;
    let key = match value {
        [b'"', quoted @ ..] => {
            unquoted = unquote(quoted.strip_suffix(b"\"")?)?;
            &unquoted
        }
        _ => value,
    };
    let is_printable = key.iter().all(|byte| (0x20..0x7f).contains(byte));
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !is_printable {
        return None;
    }
    Some(number(key).unwrap_or_else(|| hash(key)))
}

/// What a quoted string holds (RFC 8941, 3.3.3): `\"` and `\\` are its only escapes.
fn unquote(quoted: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(quoted.len());
    let mut bytes = quoted.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'"' => return None,
            b'\\' => text.push(*bytes.next().filter(|escaped| b"\"\\".contains(escaped))?),
            byte => text.push(byte),
        }
    }
    Some(text)
}

/// A UUID or 32 hexadecimal digits, as the number that it is.
fn number(key: &[u8]) -> Option<u128> {
    const HYPHENS: [usize; 4] = [8, 13, 18, 23];
    let is_uuid = key.len() == 36 && HYPHENS.iter().all(|&at| key[at] == b'-');
    let digits = key.iter().enumerate().filter(|(at, _)| !is_uuid || !HYPHENS.contains(at));
    let mut number = 0_u128;
    let mut count = 0;
    for (_, &digit) in digits {
        count += 1;
        number = number << 4 | u128::from(char::from(digit).to_digit(16)?);
    }
    (count == 32).then_some(number)
}

/// The first 16 bytes of the text's SHA-256, the first byte the most significant.
fn hash(key: &[u8]) -> u128 {
    let digest = Sha256::digest(key);
    digest.iter().take(16).fold(0, |number, &byte| number << 8 | u128::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_as_they_are() {
        let number = 0x8e03_978e_40d5_43e8_bc93_6894_a57f_9324;
        for key in [
            "8e03978e-40d5-43e8-bc93-6894a57f9324",
            "\"8e03978e-40d5-43e8-bc93-6894a57f9324\"",
            "8E03978E40D543E8BC936894A57F9324",
        ] {
            assert_eq!(parse(key.as_bytes()), Some(number), "{key}");
        }
    }

    /// The published digest of "abc" (FIPS 180-2, appendix B.1).
    #[test]
    fn text_is_hashed_as_documented() {
        let abc = 0xba78_16bf_8f01_cfea_4141_40de_5dae_2223;
        assert_eq!(parse(b"abc"), Some(abc));
        assert_eq!(parse(b"\"abc\""), Some(abc));
        assert_eq!(parse(br#""a\"b""#), parse(br#"a"b"#));
        for text in ["8e03978e-40d5-43e8-bc93-6894a57f932", "8e03978e-40d5-43e8-bc936894a57f93240"]
        {
            assert_eq!(parse(text.as_bytes()), Some(hash(text.as_bytes())), "no UUID: {text}");
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let long = vec![b'a'; 256];
        let bad: [&[u8]; 9] = [
            b"",
            b"\"",
            b"\"a",
            b"\"\"",
            b"\"a\"b\"",
            br#""a\b""#,
            "schlüssel".as_bytes(),
            b"a\x01",
            &long,
        ];
        for value in bad {
            assert_eq!(parse(value), None, "{}", String::from_utf8_lossy(value));
        }
        assert!(parse(&long[1..]).is_some());
    }
}
