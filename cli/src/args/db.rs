//! `fwpush db`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// The server's database
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush db migrate --from sqlite:fw/server/data/fwpush.db \\
    --to postgres://fwpush@db.example/fwpush")]
pub struct DbArgs {
    #[command(subcommand)]
    pub command: DbCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum DbCommand {
    Migrate(DbMigrate),
}

/// Carry the embedded database of a stopped server over to PostgreSQL
///
/// The target must be an empty database that the user may make tables in. Everything is copied in one transaction, read back
/// and compared; then the embedded database is sealed, so that nothing is served from it any more. Cut off, repeat it.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush db migrate --from sqlite:fw/server/data/fwpush.db \\
    --to 'postgres://fwpush@/fwpush?host=/run/postgresql'
  fwpush db migrate --from sqlite:fw/server/data/fwpush.db \\
    --to postgres://fwpush@db.example/fwpush --password-file db.password")]
pub struct DbMigrate {
    /// Database of the stopped server
    #[arg(long, value_name = "sqlite:PATH")]
    pub from: String,

    /// Empty database, without a password
    #[arg(long, value_name = "postgres://USER@HOST/DATABASE")]
    pub to: String,

    /// File that holds the password of the target
    #[arg(long, env = "FWPUSH_DATABASE_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,

    /// Authorities by which the target's server is known, beside public ones
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}
