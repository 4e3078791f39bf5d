------------------------------- MODULE Lease -------------------------------
(***************************************************************************)
(* One stream's lease: its row in the database, the workers that want it,  *)
(* the messages between them, fenced writes in flight, and operators.      *)
(*                                                                         *)
(* Time is relative: nothing says what time it is, only how many ticks of  *)
(* the database's clock are left of each thing. So the model needs no end  *)
(* of time, and a delay may be as long as it likes. A worker that stands   *)
(* still (SIGSTOP, a garbage collection) is a worker that takes no step    *)
(* while the clock ticks: nobody is made to hurry, but for Live.           *)
(*                                                                         *)
(* Messages are delayed, overtaken, lost, and executed more than once. The *)
(* database executes a request in one step (that is what a row's lock is   *)
(* for); what the lock protects from is in the variants: each name in      *)
(* Broken takes one protection away, and check.py shows that TLC then      *)
(* finds the harm.                                                         *)
(***************************************************************************)
EXTENDS Integers, FiniteSets, TLC

CONSTANTS
    Workers,      \* names of owners
    Operators,    \* people with the command in their hands
    None,         \* nobody
    TTL,          \* how long a lease lasts, in ticks of the database's clock
    Margin,       \* what the worker takes off it
    Drift,        \* by how much its clock may be late over a TTL
    MaxToken,     \* where the model ends: no grant raises the token past it
    MaxMessages,  \* how many messages are under way at once
    Broken        \* names of the protections that are taken away

ASSUME /\ 0 <= Drift /\ Drift <= Margin /\ Margin < TTL
       /\ MaxToken > 0 /\ MaxMessages > 0

Sound(protection) == protection \notin Broken

VARIABLES
    row,       \* the stream's row: owner, token, and ticks left until expires_at (0: expired)
    session,   \* by worker: the highest token that it has known, and how long it trusts it (0: not at all)
    write,     \* by worker: the token of its fenced transaction in flight, or 0
    messages,  \* under way: requests to the database, and its answers
    operator,  \* by operator: what is between its two steps, and the token that the first one saw
    cut        \* for the invariants only: the last token whose live lease an operator ended, how long ago it was

vars == <<row, session, write, messages, operator, cut>>

Max(a, b) == IF a > b THEN a ELSE b
Live == row.owner # None /\ row.left > 0
Idle == [act |-> "none", to |-> None, seen |-> 0]
Dead == [token |-> -1, trust |-> 0]   \* no such process
Born == [token |-> 0, trust |-> 0]    \* a process that has known nothing yet

(***************************************************************************)
(* The trust window, in the database's ticks: by a worker's clock it is    *)
(* TTL - Margin, and that clock may be late by Drift.                      *)
(***************************************************************************)
Window == TTL - (IF Sound("margin") THEN Margin ELSE 0) + Drift

Init ==
    /\ row = [owner |-> None, token |-> 0, left |-> 0]
    /\ session = [w \in Workers |-> Born]
    /\ write = [w \in Workers |-> 0]
    /\ messages = {}
    /\ operator = [o \in Operators |-> Idle]
    /\ cut = [token |-> 0, left |-> 0]

-----------------------------------------------------------------------------
(* What a worker sends. `trust` counts down from before the send.          *)

Send(m) == /\ Cardinality(messages) < MaxMessages
           /\ messages' = messages \union {m}

SendAcquire(w) ==
    /\ session[w] # Dead /\ session[w].trust = 0
    /\ Send([kind |-> "acquire", by |-> w, token |-> 0, trust |-> Window])
    /\ UNCHANGED <<row, session, write, operator, cut>>

\* One that holds nothing beats too: the answer may tell of a lease that an operator moved to it.
SendBeat(w) ==
    /\ session[w] # Dead
    /\ Send([kind |-> "beat", by |-> w, trust |-> Window,
             token |-> IF session[w].trust > 0 THEN session[w].token ELSE 0])
    /\ UNCHANGED <<row, session, write, operator, cut>>

\* The work has ended, and with it the trust, before the release is sent.
SendRelease(w) ==
    /\ session[w].trust > 0
    /\ session' = [session EXCEPT ![w].trust = 0]
    /\ Send([kind |-> "release", by |-> w, token |-> session[w].token, trust |-> 0])
    /\ UNCHANGED <<row, write, operator, cut>>

\* What it has sent is still under way, and so is its COMMIT; answers reach nobody.
Crash(w) ==
    /\ session[w] # Dead
    /\ session' = [session EXCEPT ![w] = Dead]
    /\ messages' = {m \in messages : ~(m.kind = "answer" /\ m.by = w)}
    /\ UNCHANGED <<row, write, operator, cut>>

(***************************************************************************)
(* A new process has a name that nobody had before it. A name that is      *)
(* mentioned nowhere any more is as good as one.                           *)
(***************************************************************************)
Start(w) ==
    /\ session[w] = Dead
    /\ Sound("names") => /\ row.owner # w /\ write[w] = 0
                         /\ \A m \in messages : m.by # w
                         /\ \A o \in Operators : operator[o].to # w
    /\ session' = [session EXCEPT ![w] = Born]
    /\ UNCHANGED <<row, write, messages, operator, cut>>

-----------------------------------------------------------------------------
(* What the database does with a request, whenever it gets it.             *)

\* The row may be granted only while no fenced write holds it.
Grantable == (\A w \in Workers : write[w] = 0) \/ ~Sound("fence-lock")

\* It is executed once more later (a retry, a packet that was late), or it is not.
Executed(m, answers) ==
    \E rest \in {messages, messages \ {m}} :
        /\ messages' = rest \union answers
        /\ Cardinality(messages') <= MaxMessages

\* The answer, where it can be trusted at all.
Answer(m, token, trust) ==
    IF trust > 0 \/ ~Sound("trust-before-send")
    THEN {[kind |-> "answer", by |-> m.by, token |-> token, trust |-> Max(trust, 0)]}
    ELSE {}

\* Of a lease that was granted or renewed before, only what is left of it.
Remaining(m) == IF Sound("remaining") THEN m.trust - (TTL - row.left) ELSE m.trust

Granted(to, token) == [owner |-> to, token |-> token, left |-> TTL]

Acquire(m) ==
    /\ m.kind = "acquire"
    /\ \/ /\ ~Live \/ ~Sound("acquire-expiry")
          /\ Grantable
          /\ row.token < MaxToken
          /\ LET token == IF Sound("acquire-bump") \/ row.token = 0 THEN row.token + 1 ELSE row.token
             IN /\ row' = Granted(m.by, token)
                /\ Executed(m, Answer(m, token, m.trust))
       \/ /\ Live /\ row.owner = m.by      \* the same attempt again: the same grant
          /\ Executed(m, Answer(m, row.token, Remaining(m)))
          /\ UNCHANGED row
    /\ UNCHANGED <<session, write, operator, cut>>

Named(m) == row.owner = m.by /\ row.token = m.token

Renewable(m) ==
    /\ IF Sound("renew-token") THEN Named(m) ELSE row.owner = m.by /\ m.token > 0
    /\ row.left > 0 \/ ~Sound("renew-expiry")

Renew(m) ==
    /\ row' = [row EXCEPT !.left = TTL]
    /\ Executed(m, Answer(m, m.token, m.trust))
    /\ UNCHANGED <<session, write, operator, cut>>

\* Fenced writes in flight do not hold it up. Unknown to the worker, but in its name: the answer tells of it.
Beat(m) ==
    /\ m.kind = "beat"
    /\ \/ Renewable(m) /\ Sound("renew-lock-first") /\ Renew(m)
       \/ /\ Live /\ row.owner = m.by /\ ~Renewable(m)
          /\ Executed(m, Answer(m, row.token, Remaining(m)))
          /\ UNCHANGED <<row, session, write, operator, cut>>

\* Without "lock first": the statement looks, waits for somebody's lock that is then rolled back, and updates.
BeatLooks(m) ==
    /\ ~Sound("renew-lock-first")
    /\ m.kind = "beat" /\ Renewable(m)
    /\ messages' = (messages \ {m}) \union {[m EXCEPT !.kind = "looked"]}
    /\ UNCHANGED <<row, session, write, operator, cut>>

BeatUpdates(m) == m.kind = "looked" /\ Named(m) /\ Renew(m)

\* Does not wait for fenced writes in flight: they commit before the next grant.
Release(m) ==
    /\ m.kind = "release"
    /\ IF Sound("release-token") THEN Named(m) ELSE row.owner = m.by
    /\ row' = [row EXCEPT !.owner = None, !.left = 0]
    /\ Executed(m, {})
    /\ UNCHANGED <<session, write, operator, cut>>

\* Also a request that is refused, or an answer that nobody waits for any more.
Lose(m) ==
    /\ messages' = messages \ {m}
    /\ UNCHANGED <<row, session, write, operator, cut>>

(***************************************************************************)
(* A token that the worker has known before is not opened again: it may    *)
(* have closed that session meanwhile, and its release may be under way.   *)
(***************************************************************************)
Receive(m) ==
    /\ m.kind = "answer" /\ session[m.by] # Dead
    /\ LET mine == session[m.by]
           trust == IF Sound("trust-before-send") THEN m.trust ELSE Window
           news == m.token > mine.token \/ (~Sound("adopt-once") /\ m.token = mine.token)
       IN session' = [session EXCEPT ![m.by] =
              IF news THEN [token |-> m.token, trust |-> trust]
              ELSE IF m.token = mine.token /\ mine.trust > 0 THEN [mine EXCEPT !.trust = Max(@, trust)]
              ELSE mine]
    /\ messages' = messages \ {m}
    /\ UNCHANGED <<row, write, operator, cut>>

-----------------------------------------------------------------------------
(* Fenced writes. Whoever writes, trusted or not, alive or not, names its  *)
(* token; the fence passes or refuses. In flight it may commit at any time.*)

Fence(w, token) ==
    /\ write[w] = 0
    /\ row.owner = w
    /\ token = row.token \/ ~Sound("fence-token")
    /\ row.left > 0 \/ ~Sound("fence-expiry")
    /\ write' = [write EXCEPT ![w] = token]
    /\ UNCHANGED <<row, session, messages, operator, cut>>

\* It commits, or it is rolled back: either way it holds the row no longer.
End(w) ==
    /\ write[w] # 0
    /\ write' = [write EXCEPT ![w] = 0]
    /\ UNCHANGED <<row, session, messages, operator, cut>>

\* The server ends what is still there when the lease has ended, hung or not.
ServerEnds(w) == Sound("server-ends") /\ row.left = 0 /\ End(w)

-----------------------------------------------------------------------------
(* An operator's two steps, each a commit. One who gives up in between may *)
(* begin anew.                                                             *)

Cut == IF Live THEN [token |-> row.token, left |-> TTL] ELSE cut

EndNow(o, act, to) ==
    /\ row.token < MaxToken
    /\ act = "expire" => row.owner # None
    /\ operator' = [operator EXCEPT ![o] = [act |-> act, to |-> to, seen |-> row.token]]
    /\ row' = [row EXCEPT !.left = 0]
    /\ cut' = Cut
    /\ UNCHANGED <<session, write, messages>>

Done(o) == operator' = [operator EXCEPT ![o] = Idle]

\* Whoever was granted it since the first step keeps it.
Revoke(o) ==
    /\ operator[o].act = "expire"
    /\ IF ~Sound("expire-bump")
       THEN row' = [row EXCEPT !.owner = None, !.left = 0] /\ cut' = Cut   \* nor does this wait for the writes
       ELSE /\ Grantable
            /\ IF row.token > operator[o].seen
               THEN UNCHANGED <<row, cut>>
               ELSE row' = [owner |-> None, token |-> row.token + 1, left |-> 0] /\ cut' = Cut
    /\ Done(o)
    /\ UNCHANGED <<session, write, messages>>

\* Whoever holds it by now.
HandOver(o) ==
    /\ operator[o].act = "steal"
    /\ Grantable
    /\ row.token < MaxToken
    /\ row' = Granted(operator[o].to, IF Sound("steal-bump") THEN row.token + 1 ELSE row.token)
    /\ cut' = Cut
    /\ Done(o)
    /\ UNCHANGED <<session, write, messages>>

-----------------------------------------------------------------------------
Less(n) == IF n > 0 THEN n - 1 ELSE 0

Tick ==
    /\ row' = [row EXCEPT !.left = Less(@)]
    /\ session' = [w \in Workers |-> [session[w] EXCEPT !.trust = Less(@)]]
    /\ cut' = [cut EXCEPT !.left = Less(@)]
    /\ messages' = {m \in {[each EXCEPT !.trust = Less(@)] : each \in messages} :
                       m.kind = "answer" /\ Sound("trust-before-send") => m.trust > 0}
    /\ UNCHANGED <<write, operator>>

OfWorker(w) == SendAcquire(w) \/ SendBeat(w) \/ SendRelease(w) \/ Crash(w) \/ Start(w)
OfMessage(m) == Acquire(m) \/ Beat(m) \/ BeatLooks(m) \/ BeatUpdates(m) \/ Release(m) \/ Lose(m) \/ Receive(m)
OfOperator(o) == \/ EndNow(o, "expire", None) \/ \E w \in Workers : EndNow(o, "steal", w)
                 \/ Revoke(o) \/ HandOver(o)

Next ==
    \/ Tick
    \/ \E w \in Workers : OfWorker(w) \/ End(w) \/ \E token \in 1..row.token : Fence(w, token)
    \/ \E m \in messages : OfMessage(m)
    \/ \E o \in Operators : OfOperator(o)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
(* The promises.                                                           *)

TypeOK ==
    /\ row \in [owner : Workers \union {None}, token : 0..MaxToken, left : 0..TTL]
    /\ session \in [Workers -> [token : -1..MaxToken, trust : 0..TTL + Drift]]
    /\ write \in [Workers -> 0..MaxToken]
    /\ \A m \in messages : m.by \in Workers /\ m.token \in 0..MaxToken /\ m.trust \in 0..TTL + Drift
    /\ operator \in [Operators -> [act : {"none", "expire", "steal"}, to : Workers \union {None}, seen : 0..MaxToken]]
    /\ cut \in [token : 0..MaxToken, left : 0..TTL]

\* 1. The token never falls, and whoever becomes the owner has a token that nobody had.
Monotonic == [][/\ row'.token >= row.token
                /\ row'.owner \notin {None, row.owner} => row'.token > row.token]_row

\* 2. A grant begins when the one before it has ended; only an operator cuts one short.
Exclusive == [][row'.token # row.token /\ Live => \E o \in Operators : operator[o] # Idle /\ operator'[o] = Idle]_vars

\* ... and so do those who believe in one, but for the window after an operator's cut.
OneBelieves == \A v, w \in Workers :
    v # w /\ session[v].trust > 0 /\ session[w].trust > 0 => cut.left > 0

\* 3. What may still commit has the current token; the row is its owner's, or has been released.
Fenced == \A w \in Workers : write[w] # 0 => write[w] = row.token /\ row.owner \in {w, None}

\* ... its lease had not expired when it was checked
Checked == [][\A w \in Workers : write[w] = 0 /\ write'[w] # 0 => Live /\ row.owner = w]_write

\* ... and when an operator's command returns, nothing under the old token may commit any more.
Obeyed == [][\A o \in Operators : operator[o] # Idle /\ operator'[o] = Idle =>
                 \A w \in Workers : write'[w] = 0 \/ write'[w] > operator[o].seen]_vars

\* 4. Only a live lease is extended, and to its owner only.
NoResurrection == [][row'.token = row.token /\ row'.left > row.left => Live /\ row'.owner = row.owner]_row

\* 5. Who trusts has it, and for longer than it trusts. An operator's cut is known within a trust window.
TrustIsTruth == \A w \in Workers : session[w].trust > 0 =>
    IF session[w].token > cut.token
    THEN row.owner = w /\ row.token = session[w].token /\ row.left >= session[w].trust
    ELSE cut.left > 0

(***************************************************************************)
(* 8. A lease that has expired is owned again, or free, whatever its owner *)
(* and its hung writers do. Assumed: the clock ticks; the server ends      *)
(* writers; of the processes that are started again and again, and of the  *)
(* messages that are lost again and again, some live and arrive.           *)
(***************************************************************************)
Fair ==
    /\ WF_vars(Tick)
    /\ \A w \in Workers :
        /\ WF_vars(ServerEnds(w)) /\ WF_vars(Start(w)) /\ SF_vars(SendAcquire(w))
        /\ SF_vars(\E m \in messages : m.by = w /\ Acquire(m))
        /\ SF_vars(\E m \in messages : m.by = w /\ Lose(m))

LiveSpec == Spec /\ Fair

Retaken == (row.owner # None /\ row.left = 0) ~> (Live \/ row.owner = None \/ row.token = MaxToken)

Symmetry == Permutations(Workers) \union Permutations(Operators)
=============================================================================
