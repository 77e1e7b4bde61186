"""A Channel Manager to develop and test against: NaviPartner's side of the webhook, simulated in one process.

    python -m app.dev.sandbox --port 0 --seed 1 --settle-after 0.5

prints one line `{"url": "http://127.0.0.1:PORT", "pid": ..., "seed": ...}` once it listens. From Python:
`app.dev.sandbox.process.start()`. Everything lies in memory. Whatever a run makes up (ids, reference numbers,
which calls a fault strikes) follows from the seed and from what is asked, not from the order in which concurrent
calls arrive; times are the clock's.

What it does is read from NaviPartner's public documentation and AL source, not from our client: the two are
independent readings of the same facts.

The Channel Manager: `/{tenant}/{environment}/{company}/channelManager...` and `.../webhook...`
-----------------------------------------------------------------------------------------------
Any address and any key (`x-np-api-key`, or `Authorization: Bearer`) will do until a company is declared. The id of
a company that was not declared follows from its address: ask `GET /_sandbox/companies?tenant=&environment=&company=`.

The item number of a line says what becomes of it:

    PKG...      a package: `componentSchedule`, a ticket for each component and one coupon in each wallet
    GRP...      a group ticket: one wallet for all
    CPN...      a coupon instead of a ticket
    FAIL...     issuing fails: the order ends as Error
    STUCK...    issuing never ends: the order stays in Processing
    NOMANIFEST..issued, but without manifests
    UNKNOWN...  400, there is no such item

An order with a payment reference ends as Issued, one without as Draft. A visit date in the past is refused.

The admin API: `/_sandbox/...`, JSON, no key; unknown fields are refused
-------------------------------------------------------------------------
GET, PATCH  settings      how fast, how many, in which shape: see `settings.Settings`; PATCH takes a part of it
GET, POST   companies     POST {id, name, tenant, environment, api_keys, forbidden_keys, partner_ids, manifest};
                          from the first one on, unknown addresses and keys are refused
GET         faults        the rules, with how often each has struck
POST, PUT   faults        add one rule or a list (PUT: instead of all there are); see `fault.Fault`
DELETE      faults, faults/{number}
GET, DELETE stats         totals: calls per operation and status, 429s, most calls at once, deliveries, backlog
GET         orders        one row an order: status, getOrder calls, those answered well (200 and sound), times of
                          the settlements, events fired, events acknowledged with 2xx; ?company_id=
POST        orders        orders without createOrder: {tenant, environment, company | company_id, partner_id, count,
                          mix: {"Issued": 8, "Draft": 1, "Error": 1}, events: times each is announced, ...}
POST        settle        {order_id, company_id, status, events}: put an order into a status, as the back office can
POST        fire          {order_id, company_id, times, timestamp, status}: announce it again; `"timestamp": "last"`
                          repeats the last one, which makes an exact duplicate
GET         deliveries    the latest POSTs to webhooks with their answers; ?since=NUMBER
POST        pause, resume no webhook is sent in between; nothing is forgotten
PATCH       subscriptions/{id}   {state}: switch it off ("Disabled") or on ("Active")

Fault rules
-----------
`{"kind": "status", "operation": "getOrder", "status": 429, "retry_after": 2, "calls": 3}`; kinds for calls: `status`,
`latency`, `hang`, `truncated`, `cut`, `rubbish`, `wrong_order`; for events: `duplicate`, `late`, `reorder`,
`bad_secret`, `lost`. A rule narrows with `operation`, `company_id`, `order_id`, `rate` (share of the calls), `calls`
(the next n it would strike), `first` (only the first k calls of each order) and `lasts` (seconds from now); ids are
written in lower case.
404-then-200 is `{"kind": "status", "operation": "getOrder", "status": 404, "first": 2}`.
"""
