#!/bin/sh
set -e
url=$1/latest
token=$(wget -qO- --timeout 20 --tries 1 --method PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 21600' "$url/api/token")
get() { wget -qO- --timeout 20 --tries 1 --header "X-aws-ec2-metadata-token: $token" "$url/$1"; }
get "meta-data/iam/security-credentials/$(get meta-data/iam/security-credentials/)"
