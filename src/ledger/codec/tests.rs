use proptest::prelude::*;

use super::*;

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..20_u64, u64::MAX - 20..=u64::MAX, Just(1 << 63)]
}

prop_compose! {
    fn ids()(generation in prop_oneof![0..3_u64, Just(u64::MAX)], number in number())
        -> ReservationId {
        ReservationId { generation, number }
    }
}

prop_compose! {
    fn times()(
        millis in prop_oneof![0..100_u64, Just(Timestamp::MAX.as_unix_millis()), Just(1 << 41)],
    ) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }
}

prop_compose! {
    fn parts()(
        user: u64,
        quota in prop_oneof![0..2_u16, any::<u16>()],
        window in prop_oneof![0..2_u64, 0..=WindowStart::MAX.0, Just(WindowStart::MAX.0)],
        amount in prop_oneof![Just(1), 1..=AMOUNT_MAX, Just(AMOUNT_MAX)],
    ) -> Part {
        Part { user, quota: QuotaId(quota), window: WindowStart(window), amount }
    }
}

prop_compose! {
    fn answers()(
        part in parts(),
        request: u128,
        how in (1..=3_u8, any::<bool>()),
        numbers in (0..=AMOUNT_MAX, prop_oneof![0..3_u64, 0..=AMOUNT_MAX, Just(AMOUNT_MAX)]),
        at in times(),
        id in ids(),
    ) -> Answer {
        let Part { user, quota, window, amount } = part;
        let (asked, is_admitted) = (Asked::from_number(how.0).unwrap(), how.1);
        let reservation = (asked == Asked::Reserve && is_admitted).then_some(id);
        let (used, limit) = numbers;
        Answer {
            request, asked, is_admitted, user, quota, window, amount, used, limit, at,
            reservation,
        }
    }
}

prop_compose! {
    fn recorded()(
        user: u64,
        quota: u16,
        payload in prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..40),
            Just(vec![7; PAYLOAD_BYTES_MAX]),
        ],
    ) -> Recorded {
        Recorded { user, quota: QuotaId(quota), payload }
    }
}

pub(in crate::ledger) fn events() -> impl Strategy<Value = LedgerEvent> {
    let how = (1..=3_u8).prop_map(|number| Settlement::from_number(number).unwrap());
    prop_oneof![
        (ids(), times(), proptest::collection::vec(parts(), 1..=PARTS_MAX)).prop_map(
            |(id, expires, parts)| LedgerEvent::Open { id, expires, parts: parts.into() }
        ),
        (ids(), times()).prop_map(|(id, expires)| LedgerEvent::Extend { id, expires }),
        (ids(), how, times(), proptest::collection::vec(parts(), 0..=PARTS_MAX)).prop_map(
            |(id, how, at, parts)| LedgerEvent::Settle { id, how, at, parts: parts.into() }
        ),
        answers().prop_map(LedgerEvent::Answer),
        recorded().prop_map(LedgerEvent::Recorded),
    ]
}

fn decode(bytes: &[u8]) -> DecodeResult<Vec<LedgerEvent>> {
    let mut events = Events::new(bytes);
    let mut found = Vec::new();
    while let Some(event) = events.next_event()? {
        found.push(event);
    }
    Ok(found)
}

/// Those of parts of one quota and window come in runs, as they do where much is written.
fn runs() -> impl Strategy<Value = Vec<LedgerEvent>> {
    let run = |event: LedgerEvent, steps: Vec<(u64, u64, u64)>| {
        let near = steps.into_iter().map(move |(number, millis, user)| {
            let mut event = event.clone();
            let later = |time: &mut Timestamp| {
                *time = time.saturating_add(std::time::Duration::from_millis(millis));
            };
            match &mut event {
                LedgerEvent::Open { id, expires: at, parts }
                | LedgerEvent::Settle { id, at, parts, .. } => {
                    id.number = id.number.wrapping_add(number);
                    later(at);
                    parts.iter_mut().for_each(|part| part.user = user);
                }
                LedgerEvent::Extend { id, expires } => {
                    id.number = id.number.wrapping_sub(number);
                    later(expires);
                }
                LedgerEvent::Answer(answer) => {
                    (answer.user, answer.request) = (user, user.into());
                    later(&mut answer.at);
                }
                LedgerEvent::Recorded(_) => {}
            }
            event
        });
        near.collect::<Vec<_>>()
    };
    let steps = proptest::collection::vec((0..3_u64, 0..3_u64, any::<u64>()), 1..4);
    let runs = (events(), steps).prop_map(move |(event, steps)| run(event, steps));
    proptest::collection::vec(runs, 0..12).prop_map(|runs| runs.concat())
}

proptest! {
    #[test]
    fn events_round_trip(events in runs(), cut in 0..20_usize) {
        let mut writer = EventWriter::default();
        // What was put before a `clear` has no part in what follows.
        events.iter().rev().for_each(|event| writer.put(event));
        writer.clear();
        for event in &events {
            let before = writer.bytes().len();
            writer.put(event);
            let len = writer.bytes().len() - before;
            prop_assert!(len as u64 >= EVENT_BYTES_MIN);
            if let LedgerEvent::Open { parts, .. } = event {
                prop_assert!(len <= open_bytes_max(parts.len()));
            }
        }
        prop_assert_eq!(decode(writer.bytes()).unwrap(), &events[..]);
        // A copy of the decoder goes on where it was copied.
        let mut decoder = Events::new(writer.bytes());
        for _ in 0..cut {
            decoder.next_event().unwrap();
        }
        let mut copy = decoder.clone();
        let rest = std::iter::from_fn(|| copy.next_event().unwrap()).collect::<Vec<_>>();
        prop_assert_eq!(&rest[..], events.get(cut..).unwrap_or_default());
    }

    /// Every piece is decoded on its own, and no larger than asked for.
    #[test]
    fn what_does_not_fit_leaves_no_trace(events in runs(), bytes_max in 0..200_usize) {
        let mut writer = EventWriter::default();
        let mut found = Vec::new();
        for event in &events {
            if !writer.put_within(bytes_max, event) {
                let piece = decode(writer.bytes()).unwrap();
                prop_assert!(writer.bytes().len() <= bytes_max || piece.len() == 1);
                found.extend(piece);
                writer.clear();
                prop_assert!(writer.put_within(bytes_max, event));
            }
        }
        found.extend(decode(writer.bytes()).unwrap());
        prop_assert_eq!(found, &events[..]);
    }

    /// One that was taken back is not what the next is relative to.
    #[test]
    fn what_is_taken_back_is_not_before_the_next(
        (first, back, next) in (events(), events(), events()),
    ) {
        let mut writer = EventWriter::default();
        writer.put(&first);
        let mut without = EventWriter::default();
        without.put(&first);
        prop_assert!(!writer.put_within(0, &back));
        writer.put(&next);
        without.put(&next);
        prop_assert_eq!(writer.bytes(), without.bytes());
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        bytes: Vec<u8>,
        // Of tags and small numbers, so that more is reached.
        likely in proptest::collection::vec(
            prop_oneof![1..16_u8, BESIDE..=BESIDE_LAST, 0..4_u8, any::<u8>()], 0..200),
    ) {
        for bytes in [bytes, likely] {
            let mut events = Events::new(&bytes);
            let mut found = EventWriter::default();
            while let Ok(Some(event)) = events.next_event() {
                // What can be read can have been written, if not in these bytes.
                found.put(&event);
                if let LedgerEvent::Open { parts, .. } | LedgerEvent::Settle { parts, .. } = event {
                    prop_assert!(parts.iter().all(|part| part.window <= WindowStart::MAX));
                }
            }
            prop_assert!(decode(found.bytes()).is_ok());
        }
    }
}

fn encode(events: &[LedgerEvent]) -> Vec<u8> {
    let mut writer = EventWriter::default();
    events.iter().for_each(|event| writer.put(event));
    writer.bytes().to_vec()
}

const PART: Part = Part { user: 1, quota: QuotaId(1), window: WindowStart(1), amount: 1 };

#[test]
fn what_can_not_have_been_written_is_refused() {
    let id = ReservationId { generation: 1, number: 1 };
    let expires = Timestamp::MIN;
    let too_many = vec![PART; PARTS_MAX + 1];
    for parts in [vec![], too_many, vec![Part { amount: 0, ..PART }]] {
        let open = LedgerEvent::Open { id, expires, parts: parts.into() };
        assert!(decode(&encode(std::slice::from_ref(&open))).is_err());
        assert!(decode(&encode(&[open.clone(), open])).is_err());
    }
    for len in [0, PAYLOAD_BYTES_MAX + 1] {
        let recorded = Recorded { user: 1, quota: QuotaId(1), payload: vec![1; len] };
        assert!(decode(&encode(&[LedgerEvent::Recorded(recorded)])).is_err(), "{len}");
    }
    for bytes in
        [&[0][..], &[6], &[5, 1, 1, 2, 1], &[3, 1, 1, 0, 0, 0], &[3, 1, 1, 4, 0, 0], &[2, 1, 1]]
    {
        assert!(decode(bytes).is_err(), "{bytes:?}");
    }
}

/// After what comes before and `tag`: numbers, each as it is written.
fn beside(before: &[LedgerEvent], tag: u8, request: &[u8], numbers: &[u64]) -> Vec<u8> {
    let mut bytes = [&encode(before)[..], &[tag], request].concat();
    numbers.iter().for_each(|&number| put_varint(&mut bytes, number));
    bytes
}

#[test]
fn what_can_not_have_been_written_is_refused_beside_others_too() {
    let id = ReservationId { generation: 1, number: 1 };
    let (how, at) = (Settlement::Expired, Timestamp::MAX);
    let end = [LedgerEvent::Settle { id, how, at, parts: Parts::new() }];
    let open = [LedgerEvent::Open { id, expires: at, parts: [PART].into() }];
    let near = |before: &[LedgerEvent], tag, numbers: &[u64]| {
        decode(&beside(before, tag, &[], numbers)).map(|events| events.last().cloned().unwrap())
    };
    // Of the number before and a millisecond earlier.
    for (ended, how) in [(1, Settlement::Committed), (2, Settlement::Cancelled), (3, how)] {
        let at = Timestamp::from_unix_millis(at.as_unix_millis() - 1);
        let settle = LedgerEvent::Settle { id, how, at, parts: Parts::new() };
        assert_eq!(near(&end, NEAR | ended, &[0, 1]), Ok(settle));
    }
    let too_late = Err("a time beyond the year 9999");
    for (before, tag, numbers) in [
        (&end, NEAR | 1, &[0, 2][..]),
        (&open, NEAR, &[0, 2]),
        (&open, NEAR | WITH_PART, &[0, 2, 1, 1]),
        (&open, NEAR | WITH_PART | 2, &[0, 1, 1, 1]),
        // Before 1970.
        (&open, NEAR | WITH_PART | 2, &[0, u64::MAX, 1, 1]),
    ] {
        assert_eq!(near(before, tag, numbers), too_late, "{tag} {numbers:?}");
    }
    let nothing = Err("a reservation of nothing");
    assert_eq!(near(&open, NEAR | WITH_PART, &[0, 0, 1, 0]), nothing);
    let too_much = Err("an amount above 2^63 - 1");
    assert_eq!(near(&open, NEAR | WITH_PART, &[0, 0, 1, 1 << 63]), too_much);
    let unknown = Err("an event of an unknown kind");
    for tag in [NEAR - 1, NEAR_LAST + 1, BESIDE - 1, BESIDE_LAST + 1, 128 | OPEN] {
        assert_eq!(near(&open, tag, &[1; 20]), unknown, "{tag}");
    }

    let answer = |tag, numbers: &[u64]| decode(&beside(&end, BESIDE | tag, &[0; 16], numbers));
    let same = SAME_WINDOW | SAME_LIMIT;
    // User, amount, used, time.
    for asked in 1..=3 {
        assert!(answer(same | asked, &[1, 1, 1, 1]).is_ok());
        assert!(answer(same | asked, &[1, 1, 1]).is_err(), "cut short");
    }
    assert_eq!(answer(same, &[1, 1, 1, 1]), Err(IMPOSSIBLE_FIELD), "nothing was asked");
    assert_eq!(answer(same | 1, &[1, 1 << 63, 1, 1]), Err("an amount above 2^63 - 1"));
    assert_eq!(answer(same | 1, &[1, 1, 1 << 63, 1]), Err("an amount above 2^63 - 1"));
    assert_eq!(answer(same | 1, &[1, 1, 1, 2]), Err("a time beyond the year 9999"));
    assert_eq!(answer(SAME_WINDOW | 1, &[1, 1, 1, 1, 1 << 63]), Err("an amount above 2^63 - 1"));
    let window = |quota, window| answer(SAME_LIMIT | 1, &[1, 1, 1, 1, quota, window]);
    assert!(window(65_535, (1 << 48) - 1).is_ok());
    assert_eq!(window(65_536, 1), Err("a quota above 65535"));
    assert_eq!(window(1, 1 << 48), Err("a window beyond 48 bits"));
    assert!(answer(same | ADMITTED | 3, &[1, 1, 1, 1]).is_err(), "what was reserved is missing");
    assert!(answer(same | ADMITTED | 3, &[1, 1, 1, 1, 0, 0]).is_ok());
}

/// 2026-01-01, and the beginning of its month.
const NOW: u64 = 1_767_225_600_000;

/// What `docs/format.md` says.
#[test]
fn what_is_written_often_takes_few_bytes() {
    let id = |number| ReservationId { generation: 7, number: (1_u64 << 61) + number };
    let at = |later| Timestamp::from_unix_millis(NOW + later);
    let end = |number, later| LedgerEvent::Settle {
        id: id(number),
        how: Settlement::Committed,
        at: at(later),
        parts: Parts::new(),
    };
    let part = Part { user: 77_000, amount: 500, window: WindowStart(NOW), ..PART };
    let open = |number, later| LedgerEvent::Open {
        id: id(number),
        expires: at(later),
        parts: [part].into(),
    };
    let answer = |number| {
        LedgerEvent::Answer(Answer {
            request: u128::MAX - u128::from(number),
            asked: Asked::TryConsume,
            is_admitted: true,
            user: 77_000 + number,
            quota: part.quota,
            window: part.window,
            amount: 1,
            used: 9_000,
            limit: AMOUNT_MAX,
            at: at(number),
            reservation: None,
        })
    };
    let lens = |events: &[LedgerEvent]| {
        let mut writer = EventWriter::default();
        let mut len = |event| {
            let before = writer.bytes().len();
            writer.put(event);
            writer.bytes().len() - before
        };
        events.iter().map(&mut len).collect::<Vec<_>>()
    };
    assert_eq!(lens(&[end(0, 0), end(1, 1), end(0, 20)]), [19, 3, 3]);
    assert_eq!(lens(&[open(0, 0), open(1, 1), open(0, 20)]), [30, 8, 8]);
    assert_eq!(lens(&[answer(0), answer(1), answer(9)]), [45, 24, 24]);
    // Each kind is near others of its kind where they take turns.
    let mixed = [open(0, 600_000), end(0, 0), answer(0), open(1, 600_001), end(1, 1), answer(1)];
    assert_eq!(lens(&mixed), [30, 8, 33, 8, 3, 24]);
}

/// As they were written before version 3, and still are where nothing is near.
#[test]
fn events_that_say_all_there_is_to_say_are_read_as_always() {
    let id = ReservationId { generation: 3, number: 300 };
    let [at, later] = [5, 6].map(Timestamp::from_unix_millis);
    let other = Part { user: 2, quota: QuotaId(4), window: WindowStart(9), amount: 8 };
    let answer = Answer {
        request: 1,
        asked: Asked::Reserve,
        is_admitted: true,
        user: 1,
        quota: QuotaId(2),
        window: WindowStart(7),
        amount: 8,
        used: 200,
        limit: 201,
        at,
        reservation: Some(id),
    };
    let refused = Answer { is_admitted: false, reservation: None, ..answer };
    let request = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (how, parts) = (Settlement::Cancelled, Parts::from([PART]));
    let cases = [
        (
            vec![1, 3, 172, 2, 5, 2, 1, 1, 1, 1, 2, 4, 9, 8],
            LedgerEvent::Open { id, expires: at, parts: [PART, other].into_iter().collect() },
        ),
        (vec![2, 3, 172, 2, 6], LedgerEvent::Extend { id, expires: later }),
        (vec![3, 3, 172, 2, 2, 5, 1, 1, 1, 1, 1], LedgerEvent::Settle { id, how, at, parts }),
        (
            vec![3, 3, 172, 2, 3, 5, 0],
            LedgerEvent::Settle { id, how: Settlement::Expired, at, parts: Parts::new() },
        ),
        (
            [&[4][..], &request, &[3, 1, 1, 2, 7, 8, 200, 1, 201, 1, 5, 3, 172, 2]].concat(),
            LedgerEvent::Answer(answer),
        ),
        (
            [&[4][..], &request, &[3, 0, 1, 2, 7, 8, 200, 1, 201, 1, 5]].concat(),
            LedgerEvent::Answer(refused),
        ),
        (
            vec![5, 1, 2, 3, 7, 8, 9],
            LedgerEvent::Recorded(Recorded { user: 1, quota: QuotaId(2), payload: vec![7, 8, 9] }),
        ),
    ];
    let (bytes, events): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    assert_eq!(decode(&bytes.concat()).unwrap(), events);
    for (bytes, event) in bytes.iter().zip(&events) {
        let is_answer = matches!(event, LedgerEvent::Answer(_));
        assert!(is_answer || encode(std::slice::from_ref(event)) == *bytes, "{event:?}");
        // They too are before the next.
        let first = encode(std::slice::from_ref(event)).len();
        let mut second = encode(&[event.clone(), event.clone()]).split_off(first);
        let mut mixed = bytes.clone();
        mixed.append(&mut second);
        assert_eq!(decode(&mixed).unwrap(), [event.clone(), event.clone()]);
    }
}
