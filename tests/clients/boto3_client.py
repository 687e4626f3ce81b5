"""Role credentials, as boto3 fetches them."""
import boto3

credentials = boto3.Session().get_credentials()
print(credentials.access_key if credentials else None)
