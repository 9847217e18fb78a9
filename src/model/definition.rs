//! Quotas as they are kept: with an id, valid, and encoded in batches and snapshots.

use std::time::Duration;

use bincode::de::read::Reader;
use bincode::de::{Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError, EncodeError};

use super::window::Calendar;
use super::{Overrun, Quota, QuotaId, Window};
use crate::error::Result;

/// A defined quota. Valid: it is only ever made from a quota that passed its checks, even when it
/// is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Definition {
    pub(crate) id: QuotaId,
    pub(crate) name: String,
    pub(crate) limit: u64,
    pub(crate) calendar: Calendar,
    pub(crate) decimals: u8,
    pub(crate) overrun: Overrun,
}

impl Definition {
    /// Gives a quota its id, checking all of its bounds.
    pub(crate) fn new(id: QuotaId, quota: &Quota) -> Result<Self> {
        Ok(Self {
            id,
            name: quota.name.clone(),
            limit: quota.limit,
            calendar: quota.calendar()?,
            decimals: quota.decimals,
            overrun: quota.overrun,
        })
    }

    /// The quota from which it would be defined again.
    pub(crate) fn quota(&self) -> Quota {
        Quota {
            name: self.name.clone(),
            limit: self.limit,
            window: self.calendar.window(),
            utc_offset_minutes: self.calendar.utc_offset_minutes(),
            decimals: self.decimals,
            overrun: self.overrun,
        }
    }

    /// Whether usage counted under this definition means the same under `quota`: windows and
    /// decimals are equal.
    pub(crate) fn same_meaning(&self, quota: &Quota) -> bool {
        (self.calendar.window(), self.calendar.utc_offset_minutes(), self.decimals)
            == (quota.window, quota.utc_offset_minutes, quota.decimals)
    }
}

/// What is encoded. The order of the fields is part of the format.
#[derive(bincode::Encode, bincode::Decode)]
struct WireDefinition {
    id: u16,
    name: WireName,
    limit: u64,
    window: WireWindow,
    utc_offset_minutes: i16,
    /// And, in the highest bit, whether overruns are refused.
    decimals: u8,
}

/// In the byte of the decimals.
const REFUSES_OVERRUN: u8 = 1 << 7;

/// The order of the variants is part of the format.
#[derive(bincode::Encode, bincode::Decode)]
enum WireWindow {
    Lifetime,
    Minute,
    Hour,
    Day,
    Month,
    Year,
    Every { millis: u64 },
}

/// A text of at most 255 bytes, so that a damaged length can't make the decoder allocate much.
struct WireName(String);

impl Encode for WireName {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.as_bytes().encode(encoder)
    }
}

impl<C> Decode<C> for WireName {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let len = u64::decode(decoder)?;
        let len = u8::try_from(len).map_err(|_| DecodeError::Other("a name above 255 bytes"))?;
        let mut bytes = vec![0; usize::from(len)];
        decoder.claim_bytes_read(bytes.len())?;
        decoder.reader().read(&mut bytes)?;
        String::from_utf8(bytes)
            .map(Self)
            .map_err(|error| DecodeError::Utf8 { inner: error.utf8_error() })
    }
}
bincode::impl_borrow_decode!(WireName);

impl Encode for Definition {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        WireDefinition {
            id: self.id.as_u16(),
            name: WireName(self.name.clone()),
            limit: self.limit,
            window: WireWindow::from(self.calendar.window()),
            utc_offset_minutes: self.calendar.utc_offset_minutes(),
            decimals: match self.overrun {
                Overrun::Charge => self.decimals,
                Overrun::Refuse => self.decimals | REFUSES_OVERRUN,
            },
        }
        .encode(encoder)
    }
}

impl<C> Decode<C> for Definition {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let wire = WireDefinition::decode(decoder)?;
        let quota = Quota {
            name: wire.name.0,
            limit: wire.limit,
            window: Window::from(wire.window),
            utc_offset_minutes: wire.utc_offset_minutes,
            decimals: wire.decimals & !REFUSES_OVERRUN,
            overrun: if wire.decimals & REFUSES_OVERRUN == 0 {
                Overrun::Charge
            } else {
                Overrun::Refuse
            },
        };
        Self::new(QuotaId::from_u16(wire.id), &quota)
            .map_err(|error| DecodeError::OtherString(error.to_string()))
    }
}
bincode::impl_borrow_decode!(Definition);

impl From<Window> for WireWindow {
    fn from(window: Window) -> Self {
        match window {
            Window::Lifetime => Self::Lifetime,
            Window::Minute => Self::Minute,
            Window::Hour => Self::Hour,
            Window::Day => Self::Day,
            Window::Month => Self::Month,
            Window::Year => Self::Year,
            // A valid length is far below 2^64 milliseconds.
            Window::Every(length) => {
                Self::Every { millis: u64::try_from(length.as_millis()).unwrap_or(u64::MAX) }
            }
        }
    }
}

impl From<WireWindow> for Window {
    fn from(window: WireWindow) -> Self {
        match window {
            WireWindow::Lifetime => Self::Lifetime,
            WireWindow::Minute => Self::Minute,
            WireWindow::Hour => Self::Hour,
            WireWindow::Day => Self::Day,
            WireWindow::Month => Self::Month,
            WireWindow::Year => Self::Year,
            WireWindow::Every { millis } => Self::Every(Duration::from_millis(millis)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{decode_cold, encode_cold};

    fn definition(window: Window) -> Definition {
        let quota = Quota::new("plan", 77).window(window).utc_offset_minutes(-90).decimals(3);
        Definition::new(QuotaId(513), &quota).unwrap()
    }

    /// The bytes are in data directories: a change here needs a new format version.
    #[test]
    fn the_encoding_is_fixed() {
        let every = Window::Every(Duration::from_millis(1500));
        let cases = [
            (Window::Lifetime, vec![0]),
            (Window::Minute, vec![1]),
            (Window::Hour, vec![2]),
            (Window::Day, vec![3]),
            (Window::Month, vec![4]),
            (Window::Year, vec![5]),
            (every, vec![6, 251, 0xdc, 0x05]),
        ];
        for (window, encoded_window) in cases {
            let definition = definition(window);
            let head = [251, 1, 2, 4, b'p', b'l', b'a', b'n', 77];
            let expected = [&head[..], &encoded_window, &[179, 3]].concat();
            assert_eq!(encode_cold(&definition).unwrap(), expected, "{window:?}");
            assert_eq!(decode_cold::<Definition>(&expected).unwrap(), definition);
        }
    }

    #[test]
    fn a_definition_is_its_quota_with_an_id() {
        let definition = definition(Window::Day);
        let quota = definition.quota();
        assert_eq!(Definition::new(definition.id, &quota).unwrap(), definition);
        assert!(definition.same_meaning(&quota));
        let renamed = Quota::new("other", 1).window(Window::Day);
        assert!(definition.same_meaning(&renamed.clone().utc_offset_minutes(-90).decimals(3)));
        assert!(!definition.same_meaning(&quota.clone().window(Window::Hour)));
        assert!(!definition.same_meaning(&quota.clone().utc_offset_minutes(0)));
        assert!(!definition.same_meaning(&quota.decimals(2)));
    }

    /// Each encodes well but says something that a definition must not say.
    #[test]
    fn decoding_checks_every_field() {
        let good = definition(Window::Day);
        let with = |change: fn(&mut Definition)| {
            let mut bad = good.clone();
            change(&mut bad);
            decode_cold::<Definition>(&encode_cold(&bad).unwrap())
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|bad| bad.name.clear()).is_err());
        assert!(with(|bad| bad.name = "x".repeat(129)).is_err());
        assert!(with(|bad| bad.name = "x".repeat(1000)).is_err());
        assert!(with(|bad| bad.name = "\u{7f}".to_owned()).is_err());
        assert!(with(|bad| bad.limit = u64::MAX).is_err());
        assert!(with(|bad| bad.decimals = 19).is_err());
        let head = [1, 1, b'q', 1];
        let decode = |tail: &[u8]| decode_cold::<Definition>(&[&head, tail].concat());
        assert!(decode(&[6, 251, 0xdc, 0x05, 0, 0]).is_ok());
        assert!(decode(&[6, 251, 0xe7, 0x03, 0, 0]).is_err(), "999 ms");
        assert!(decode(&[7, 0, 0]).is_err(), "no such window");
        assert!(decode(&[3, 251, 0x91, 0x06, 0]).is_err(), "841 minutes west");
    }

    /// A damaged length must be refused before memory is set aside for it.
    #[test]
    fn a_long_name_is_refused_by_its_length() {
        let id_and_length = [1, 253, 0, 0, 0, 0, 0, 1, 0, 0];
        let config = bincode::config::standard();
        let decoded =
            bincode::decode_from_slice::<Definition, _>(&id_and_length, config).unwrap_err();
        assert!(matches!(decoded, DecodeError::Other("a name above 255 bytes")), "{decoded:?}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_decode_to_something_valid_or_not_at_all(bytes: Vec<u8>) {
            if let Ok(definition) = decode_cold::<Definition>(&bytes) {
                prop_assert!(definition.quota().validate().is_ok());
            }
        }
    }
}
