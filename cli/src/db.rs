//! `fwpush db`: carrying a server's database over to PostgreSQL.

use std::path::Path;

use fwpush_server::{
    StartError,
    db::{Carried, CarryError, DbError, Options, Place, PlaceError, carry},
};
use serde_json::json;

use crate::{
    Context,
    args::{DbArgs, DbCommand, DbMigrate},
    disk,
    failure::{Failure, Result},
    output::{escape, plural},
    progress,
};

/// Runs the command.
pub async fn run(context: &Context, args: &DbArgs) -> Result<()> {
    match &args.command {
        DbCommand::Migrate(args) => migrate(context, args).await,
    }
}

async fn migrate(context: &Context, args: &DbMigrate) -> Result<()> {
    let wrong = |option: &'static str| {
        move |error: PlaceError| {
            let name = match error.key {
                "password_file" => "--password-file",
                "ca_file" => "--ca-file",
                _ => option,
            };
            Failure::usage(format!("{name} {}", error.problem))
        }
    };
    let here = Path::new("");
    let from = Place::parse(&args.from, &Options::default(), here).map_err(wrong("--from"))?;
    let options = Options {
        password_file: args.password_file.clone(),
        ca_file: args.ca_file.clone(),
        tls: None,
    };
    let to = Place::parse(&args.to, &options, here).map_err(wrong("--to"))?;
    let Place::Sqlite(file) = &from else {
        return Err(Failure::usage("--from must be `sqlite:PATH`"));
    };
    if matches!(to, Place::Sqlite(_)) {
        return Err(Failure::usage(
            "--to must be `postgres://USER@HOST/DATABASE`",
        ));
    }
    if !file.exists() {
        let error = CarryError::NoSource { path: file.clone() };
        return Err(
            Failure::from_error(error).next("Check the path: a relative one starts from here.")
        );
    }
    let _lock = fwpush_server::lock_dir(disk::parent_of(file)).map_err(explain_lock)?;
    let bar = progress::count_bar("rows", 0);
    let told = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let carried = carry(&from, &to, told).await;
    bar.finish_and_clear();
    let carried = carried.map_err(|error| explain(error, &to))?;
    print(context, &from, &to, &carried, args.password_file.is_some())
}

fn print(
    context: &Context,
    from: &Place,
    to: &Place,
    carried: &Carried,
    password: bool,
) -> Result<()> {
    let rows: u64 = carried.tables.iter().map(|table| table.rows).sum();
    context.out.data(
        || {
            let table = |table: &fwpush_server::db::CarriedTable| json!({ "name": table.name, "rows": table.rows, "blake3": table.blake3 });
            let tables: Vec<_> = carried.tables.iter().map(table).collect();
            json!({
                "from": from.to_string(), "to": to.to_string(), "before": carried.before, "rows": rows, "tables": tables,
            })
        },
        || {
            let (from, to) = (from.to_string(), to.to_string());
            let (from, to) = (escape(&from), escape(&to));
            let done = if carried.before {
                format!("{from} was carried over to {to} before; nothing was left to do.\n")
            } else {
                format!(
                    "Carried {} in {} over to {to}; each table reads back the same.\n{from} is sealed: nothing is served from it any more.\n",
                    plural(rows, "row"),
                    plural(carried.tables.len() as u64, "table"),
                )
            };
            let password = if password { " and `password_file`" } else { "" };
            format!("{done}Next: set `url = \"{to}\"`{password} in [database] of the server's fwpush.toml,\n      then fwpush serve\n")
        },
    )
}

fn explain_lock(error: StartError) -> Failure {
    let locked = matches!(error, StartError::Locked { .. });
    let failure = Failure::from_error(error);
    if locked {
        failure.next("Stop `fwpush serve` (SIGTERM), then repeat the command.")
    } else {
        failure
    }
}

fn explain(error: CarryError, to: &Place) -> Failure {
    let repeat = "Nothing was changed: put that right, then repeat the command.".to_owned();
    let next = match &error {
        CarryError::NotEmpty { .. } => format!(
            "Nothing was changed. Make a new database for it (CREATE DATABASE ... ENCODING 'UTF8'); {to} belongs to somebody else."
        ),
        CarryError::Sealed { to } => {
            format!("Its server goes on with `[database] url = \"{to}\"`.")
        }
        CarryError::Open {
            source: DbError::Password { .. },
            ..
        } => "Name the file with --password-file.".to_owned(),
        CarryError::Differs { .. } => {
            "Nothing was changed. Look at the target's disk and log, then repeat the command."
                .to_owned()
        }
        CarryError::Unknown(_) => {
            "Repeat the command once the target answers: it ends what was begun, or begins anew."
                .to_owned()
        }
        _ => repeat,
    };
    let mut failure = Failure::from_error(error).doing("carry the database over");
    failure = failure.next(next);
    failure
}
