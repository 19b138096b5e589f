//! Releases and trust documents.

use fwpush_keys::id::{OperatorId, Product};
use fwpush_proto::v1;
use tonic::{Code, Status};

use super::{Admin, optional_id, views, words};
use crate::{api::status as map, files::StoreError, releases::PublishError, route::Change, trust};

pub async fn publish(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::PublishReleaseRequest,
) -> Result<v1::Release, Status> {
    let published = admin
        .releases
        .publish(&request.envelope, &request.file_name, operator.as_str())
        .await;
    let row = published.map_err(refused)?;
    Ok(views::release(&row))
}

/// Why a release is refused, for its engineer.
pub fn refused(error: PublishError) -> Status {
    let code = match &error {
        PublishError::Db(_) | PublishError::Store(_) | PublishError::Behind(_) => Code::Unavailable,
        PublishError::SeqTaken(_) | PublishError::VersionTaken(_) | PublishError::IdTaken(_) => {
            Code::AlreadyExists
        }
        PublishError::OlderSeq { .. }
        | PublishError::Missing(_)
        | PublishError::Expired(_)
        | PublishError::IssuedInFuture(_)
        | PublishError::Revoked(_)
        | PublishError::BelowFloor { .. }
        | PublishError::Size { .. } => Code::FailedPrecondition,
        PublishError::Envelope(_) | PublishError::Product | PublishError::FileName => {
            Code::InvalidArgument
        }
        PublishError::Refused(_) => Code::PermissionDenied,
    };
    match error {
        PublishError::Db(error) => map::db(error),
        PublishError::Store(error @ StoreError::AboveCache { .. }) => map::above_cache(error),
        PublishError::Store(error) => map::store(error),
        error => map::with_next(Status::new(code, words(&error)), next(&error)),
    }
}

/// What the engineer can do.
fn next(error: &PublishError) -> String {
    match error {
        PublishError::Envelope(_) | PublishError::Product => {
            "Build it again with `fwpush release build`, and sign it.".to_owned()
        }
        PublishError::Refused(_) => {
            "`fwpush keys show` lists products, keys and thresholds; `fwpush release sign` adds a signature.".to_owned()
        }
        PublishError::IssuedInFuture(_) => {
            "Set the clock of the machine that built it, then build and sign it again.".to_owned()
        }
        PublishError::Expired(_) => "Build and sign it again.".to_owned(),
        PublishError::Revoked(_) => {
            "What is revoked stays so: build a new release, with a new version.".to_owned()
        }
        PublishError::BelowFloor { floor, .. } => {
            format!("Build it again with --security-counter {floor} or a higher one.")
        }
        PublishError::Missing(_) => {
            "Give the image as well: fwpush release publish MANIFEST --image FILE.".to_owned()
        }
        PublishError::Size { .. } => {
            "Build the manifest from the image that is published with it.".to_owned()
        }
        PublishError::OlderSeq { newest, .. } => {
            format!("Build it again with a --seq above {newest}.")
        }
        PublishError::SeqTaken(_) => "Build it again with another --seq.".to_owned(),
        PublishError::VersionTaken(_) => {
            "Build it with a new --version; `fwpush release list` shows those that are taken.".to_owned()
        }
        PublishError::IdTaken(_) => "Build it again: each build gets an id of its own.".to_owned(),
        PublishError::FileName => "Rename the image file.".to_owned(),
        PublishError::Db(_) | PublishError::Store(_) | PublishError::Behind(_) => {
            "Repeat the command in a while.".to_owned()
        }
    }
}

pub async fn list(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListReleasesRequest,
) -> Result<v1::ListReleasesResponse, Status> {
    let product: Option<Product> = optional_id("product", &request.product)?;
    let releases = admin
        .db
        .list_releases(product.as_ref())
        .await
        .map_err(map::db)?;
    Ok(v1::ListReleasesResponse {
        releases: releases.iter().map(|row| views::release(row)).collect(),
    })
}

pub async fn publish_trust(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::PublishTrustRequest,
) -> Result<v1::TrustInfo, Status> {
    admin
        .trust
        .publish(&request.envelope, operator.as_str())
        .await
        .map_err(trust_refused)?;
    admin.route.announce(Change::Trust);
    // Also for a document that was there already: the call before this one may have been cut between its commit and this.
    let applied = admin.trust.apply_revocations(operator.as_str()).await;
    applied.map_err(map::db)?;
    Ok(views::trust(&admin.trust))
}

fn trust_refused(error: trust::PublishError) -> Status {
    use trust::PublishError as E;
    let error = match error {
        E::Db(error) => return map::db(error),
        error => error,
    };
    let code = match &error {
        E::Db(_) | E::Behind(_) => Code::Unavailable,
        E::Envelope(_) | E::Release | E::Product => Code::InvalidArgument,
        E::Refused(_) => Code::PermissionDenied,
        E::NotNewer { .. } => Code::FailedPrecondition,
    };
    let next = match error {
        E::Envelope(_) | E::Product => {
            "`fwpush keys verify FILE` says what it is; `fwpush keys show` lists the products."
        }
        E::Refused(_) => {
            "`fwpush keys verify FILE` says what it lacks: signatures, or the root before it."
        }
        E::Release => "fwpush release publish FILE --image IMAGE",
        E::NotNewer { .. } => "Make it again from the present list: fwpush keys revoke.",
        E::Db(_) | E::Behind(_) => "Repeat the command in a while.",
    };
    map::with_next(Status::new(code, words(&error)), next)
}
