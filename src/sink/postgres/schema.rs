//! The tables, and the statements on them. Names are qualified: nothing depends on `search_path`.

/// The version of the tables below.
pub(super) const VERSION: i32 = 1;

/// The tables that make up a version, including `quota_schema`.
pub(super) const TABLES: [&str; 4] =
    ["quota_schema", "quota_usage", "quota_positions", "quota_events"];

/// Serializes migrations: the number of an advisory lock, as good as any.
pub(super) const MIGRATION_LOCK: i64 = 0x746f_6c6c_6761_7465;

/// The statements for one schema.
#[derive(Debug, Clone)]
pub(super) struct Statements {
    pub(super) schema: String,
    pub(super) read_version: String,
    pub(super) read_position: String,
    pub(super) insert_position: String,
    pub(super) update_position: String,
    pub(super) add_usage: String,
    pub(super) find_other_meaning: String,
    pub(super) insert_events: String,
    pub(super) find_last_events: String,
}

impl Statements {
    pub(super) fn new(schema: &str) -> Self {
        let quoted = quote(schema);
        // Amounts and users travel as text: `numeric` holds all of `u64` and `i128`.
        let rows = "unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], \
                    $5::smallint[], $6::text[], $7::text[]) WITH ORDINALITY \
                    AS new (user_id, quota, window_start, window_end, decimals, added, \"limit\", nr)";
        Self {
            schema: schema.to_owned(),
            read_version: format!("SELECT version FROM {quoted}.quota_schema"),
            // Locked, so that a replica refuses, wherever a pooler has led the connection.
            read_position: format!(
                "SELECT batch::text, checksum FROM {quoted}.quota_positions WHERE engine_id = $1 \
                 FOR UPDATE"
            ),
            insert_position: format!(
                "INSERT INTO {quoted}.quota_positions (engine_id, batch, checksum, updated_at) \
                 VALUES ($1, $2::text::numeric, $3, now()) ON CONFLICT DO NOTHING"
            ),
            update_position: format!(
                "UPDATE {quoted}.quota_positions \
                 SET batch = $2::text::numeric, checksum = $3, updated_at = now() \
                 WHERE engine_id = $1 AND batch = $4::text::numeric AND checksum = $5"
            ),
            // In the order of the batch, as its statements are, so that transactions lock rows in
            // one order.
            add_usage: format!(
                "INSERT INTO {quoted}.quota_usage AS old \
                 (user_id, quota, window_start, window_end, decimals, used, \"limit\", updated_at) \
                 SELECT user_id::numeric, quota, window_start, window_end, decimals, \
                 added::numeric, \"limit\"::numeric, now() FROM {rows} ORDER BY nr \
                 ON CONFLICT (user_id, quota, window_start) DO UPDATE \
                 SET used = old.used + excluded.used, \"limit\" = excluded.\"limit\", \
                 updated_at = excluded.updated_at \
                 WHERE old.decimals = excluded.decimals \
                 AND old.window_end IS NOT DISTINCT FROM excluded.window_end"
            ),
            find_other_meaning: format!(
                "SELECT old.quota FROM {rows} JOIN {quoted}.quota_usage AS old \
                 ON old.user_id = new.user_id::numeric AND old.quota = new.quota \
                 AND old.window_start = new.window_start \
                 WHERE old.decimals <> new.decimals \
                 OR old.window_end IS DISTINCT FROM new.window_end LIMIT 1"
            ),
            // `$3` is how many events of the batch went before.
            insert_events: format!(
                "INSERT INTO {quoted}.quota_events (engine_id, batch, nr, user_id, quota, value, \
                 occurred_at, request_id, metadata) \
                 SELECT $1, $2::text::numeric, $3 + nr, user_id::numeric, quota, value, \
                 occurred_at, request_id, metadata::jsonb FROM unnest($4::text[], $5::text[], \
                 $6::double precision[], $7::timestamptz[], $8::text[], $9::text[]) \
                 WITH ORDINALITY AS new (user_id, quota, value, occurred_at, request_id, metadata, nr)"
            ),
            // Locked, as a position is.
            find_last_events: format!(
                "SELECT batch::text FROM {quoted}.quota_events WHERE engine_id = $1 \
                 ORDER BY quota_events.batch DESC LIMIT 1 FOR UPDATE"
            ),
        }
    }
}

/// The statements that create all tables of [`VERSION`] in an existing schema.
pub(super) fn creation(schema: &str) -> String {
    let schema = quote(schema);
    format!(
        r#"CREATE TABLE {schema}.quota_usage (
    user_id numeric(20) NOT NULL,
    quota text COLLATE "C" NOT NULL,
    window_start timestamptz NOT NULL,
    window_end timestamptz,
    decimals smallint NOT NULL,
    used numeric(39) NOT NULL,
    "limit" numeric(20) NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, quota, window_start)
);
CREATE TABLE {schema}.quota_positions (
    engine_id text COLLATE "C" PRIMARY KEY,
    batch numeric(20) NOT NULL,
    checksum bigint NOT NULL,
    updated_at timestamptz NOT NULL
);
CREATE TABLE {schema}.quota_events (
    engine_id text COLLATE "C" NOT NULL,
    batch numeric(20) NOT NULL,
    nr bigint NOT NULL,
    user_id numeric(20) NOT NULL,
    quota text COLLATE "C" NOT NULL,
    value double precision NOT NULL,
    occurred_at timestamptz NOT NULL,
    request_id text,
    metadata jsonb NOT NULL,
    PRIMARY KEY (engine_id, batch, nr)
);
CREATE TABLE {schema}.quota_schema (version integer NOT NULL);
INSERT INTO {schema}.quota_schema (version) VALUES ({VERSION});
"#
    )
}

/// An identifier, whatever it holds.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in a statement, whatever it holds, and whatever the session takes a backslash for.
pub(super) fn quote_literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', r"\\").replace('\'', "''"))
}
