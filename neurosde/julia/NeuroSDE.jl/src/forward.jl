# Forward: Euler–Maruyama, strong and weak order 1 (the noise is additive).

# Tiles of a step: acc = a ∘ h + f + Ŵ x. `FORCED` says whether there is a force f.
struct StepTile{T,FORCED}
    old::Ptr{T}
    new::Ptr{T}
    force::Ptr{T}
    decay::Ptr{T}
    row::Int  # bytes per trial
end

@inline function at_column(c::StepTile{T,FORCED}, k::Int) where {T,FORCED}
    skip = k * c.row
    StepTile{T,FORCED}(c.old + skip, c.new + skip, c.force + skip, c.decay, c.row)
end

@inline function start(c::StepTile{T,FORCED}, r::Int, k::Int) where {T,FORCED}
    V = Vec{lanes(T),T}
    vector = r * REGISTER_BYTES
    at = k * c.row + vector
    a, h = vload(V, c.decay + vector), vload(V, c.old + at)
    FORCED ? vfma(a, h, vload(V, c.force + at)) : vmul(a, h)
end

@inline finish!(c::StepTile, r::Int, k::Int, acc) = vstore!(c.new + (k * c.row + r * REGISTER_BYTES), acc)

@inline function at_vector(c::S, r::Int) where {S<:StepTile}
    skip = r * REGISTER_BYTES
    S(c.old + skip, c.new + skip, c.force + skip, c.decay + skip, c.row)
end

# Force f = Î + σ ∘ dB of a unit, as slabs: `base` the input, `sigma` the noise's scale, `z` the normals.
struct Force{T}
    out::Ptr{T}
    base::Ptr{T}
    sigma::Ptr{T}
    z::Ptr{T}
    varies::Bool  # with time
end

forced(p::Problem) = !isempty(p.input) || !isempty(p.noise)

function force_room(p::Problem{T}, trials::Int) where {T}
    slab = trials * p.neurons
    (isempty(p.input) ? 0 : room(slab, T)) + (isempty(p.noise) ? 0 : 2room(slab, T) + room(slab + 2GROUP, T))
end

function prepare_force!(w::Workspace{T}, p::Problem{T}, m::Int, first::Int, trials::Int) where {T}
    N, slab = p.neurons, trials * p.neurons
    null = Ptr{T}(C_NULL)
    base = isempty(p.input) ? null : take!(w, slab)
    isempty(p.input) || gather!(base, p.input, 0, m, first, trials, N)
    isempty(p.noise) && return Force{T}(base, base, null, null, p.input.step != 0)
    out, sigma, z = take!(w, slab), take!(w, slab), take!(w, slab + 2GROUP)
    gather!(sigma, p.sigma, 0, m, first, trials, N)
    scale = p.noise.scale
    for i in 1:slab
        unsafe_store!(sigma, unsafe_load(sigma, i) * scale, i)
    end
    Force{T}(out, base, sigma, z, p.input.step != 0)
end

"Increments (over their scale) of step t as a slab."
@inline function increments!(f::Force{T}, p::Problem{T}, t::Int, m::Int, first::Int, trials::Int) where {T}
    N = p.neurons
    drawn(p.noise) || return row(p.noise.increments, t, m, first)
    key = unsafe_load(p.noise.keys, m + 1)
    normals!(f.z, key, t, unsafe_load(p.noise.firsts, m + 1) + first * N, trials * N)
end

@inline function force!(f::Force{T}, p::Problem{T}, t::Int, m::Int, first::Int, trials::Int) where {T}
    slab = trials * p.neurons
    f.varies && gather!(f.base, p.input, t, m, first, trials, p.neurons)
    isempty(p.noise) && return nothing
    z = increments!(f, p, t, m, first, trials)
    if f.base == C_NULL
        map2!(vmul, f.out, f.sigma, z, slab)
    else
        map3!(vfma, f.out, f.sigma, z, f.base, slab)
    end
    nothing
end

function forward_room(p::Problem{T}, trials::Int, plan::TilePlan) where {T}
    slab = trials * p.neurons
    room(packed_length(p.neurons, plan, T), T) + 3room(slab, T) + room(plan.vectors * lanes(T), T) + force_room(p, trials)
end

"Simulate trials first … first + trials − 1 of network m; paths go to `activity` and `voltage` (either may be empty)."
function forward_unit!(w::Workspace{T}, p::Problem{T}, activity::Field{T}, voltage::Field{T}, m::Int, first::Int, trials::Int) where {T}
    N = p.neurons
    plan = plan_tiles(cld(N, lanes(T)), trials)
    reset!(w, forward_room(p, trials, plan))
    GC.@preserve w begin
        packed = take!(w, packed_length(N, plan, T))
        pack!(packed, p.weights + m * N * N * sizeof(T), N, plan, true)
        decay = take!(w, plan.vectors * lanes(T))
        gather!(decay, p.decay, 0, m, 0, 1, N)
        old, new, scratch = take!(w, trials * N), take!(w, trials * N), take!(w, trials * N)
        gather!(old, p.state, 0, m, first, trials, N)
        force = prepare_force!(w, p, m, first, trials)
        if forced(p)
            advance!(p, StepTile{T,true}(old, new, force.out, decay, N * sizeof(T)), packed, scratch, force, activity, voltage, plan, m, first, trials)
        else
            advance!(p, StepTile{T,false}(old, new, old, decay, N * sizeof(T)), packed, scratch, force, activity, voltage, plan, m, first, trials)
        end
    end
    nothing
end

@inline swapped(c::S) where {T,FORCED,S<:StepTile{T,FORCED}} = S(c.new, c.old, FORCED ? c.force : c.new, c.decay, c.row)

function advance!(p::Problem{T}, tile::StepTile{T}, packed::Ptr{T}, scratch::Ptr{T}, force::Force{T}, activity::Field{T}, voltage::Field{T},
                  plan::TilePlan, m::Int, first::Int, trials::Int) where {T}
    N, slab = p.neurons, trials * p.neurons
    direct = !isempty(activity) && activity.trial == N  # x goes to its place at once, and is read from there
    x = scratch
    large = large_step(p, trials)
    for t in 0:p.steps
        direct && (x = row(activity, t, m, first))
        (direct || !isempty(activity) || t < p.steps) && map!(p.phi, x, tile.old, slab)
        direct || isempty(activity) || scatter!(activity, x, t, m, first, trials, N)
        isempty(voltage) || scatter!(voltage, tile.old, t, m, first, trials, N)
        (t == p.steps || interrupted(p)) && break
        large && exit_if_orphaned(p)
        force!(force, p, t, m, first, trials)
        product!(tile, Vec{lanes(T),T}, plan, packed, 0, x, sizeof(T), tile.row, N, trials)
        tile = swapped(tile)
    end
    nothing
end

"Parts that each network's trials are cut into so that `threads` threads have work."
forward_units(p::Problem, threads::Int) =
    Units(p.networks, p.trials, p.networks >= threads ? 1 : min(p.trials, cld(threads, p.networks)))

"""
    forward!(workspaces, problem, activity, voltage, threads) -> Bool

Simulate; true if it ran to its end, false if it was interrupted.
"""
function forward!(workspaces::Vector{Workspace{T}}, p::Problem{T}, activity::Field{T}, voltage::Field{T}, threads::Int) where {T}
    units = forward_units(p, threads)
    each_unit(workspaces, units, threads) do w, i
        m, first, trials, _ = unit(units, i)
        exit_if_orphaned(p)
        interrupted(p) || forward_unit!(w, p, activity, voltage, m, first, trials)
    end
    !interrupted(p)
end
