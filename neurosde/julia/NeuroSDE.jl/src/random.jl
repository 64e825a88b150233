# Counter-based normals: Philox4x32-7 and Box–Muller.
#
# z[t, e] depends on the key, the step t and the element e alone, so that any thread, chunk or engine makes the same
# numbers. Elements come in groups of 64: lane l = 0 … 15 of group q is one Philox call on the counter
# (16 q + l, t), whose words x0 … x3 give the elements 64 q + l + (0, 16, 32, 48):
#     r(x0) cos θ(x1),  r(x0) sin θ(x1),  r(x2) cos θ(x3),  r(x2) sin θ(x3)
# with r(x) = √(−2 log((⌊x/2⌋ + ½) 2⁻³¹)) and θ(x) = π x 2⁻³¹ for x as a signed integer. Tails reach 6.66.
#
# References: Parallel random numbers: as easy as 1, 2, 3 (Salmon, Moraes, Dror, Shaw, 2011),
# https://doi.org/10.1145/2063384.2063405; 7 rounds is the smallest number that passes BigCrush there.

const PHILOX_ROUNDS = 7
const PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
const PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
const GROUP = 64

"One Philox4x32 call per 64-bit lane; words are the lanes' low halves, what is above them is left to chance."
@inline function philox(c::NTuple{4,V}, key::UInt64, ::Val{R}) where {W,V<:Vec{W,UInt64},R}
    k0, k1 = key % UInt32, (key >> 32) % UInt32
    m0, m1 = splat(V, UInt64(PHILOX_M0)), splat(V, UInt64(PHILOX_M1))
    c0, c1, c2, c3 = c
    for round in 1:R
        p0, p1 = vmulwide(c0, m0), vmulwide(c2, m1)
        c0 = vxor(vxor(vlshr(p1, Val(32)), c1), splat(V, UInt64(k0)))
        c2 = vxor(vxor(vlshr(p0, Val(32)), c3), splat(V, UInt64(k1)))
        c1, c3 = p1, p0
        k0 += PHILOX_W0
        k1 += PHILOX_W1
    end
    c0, c1, c2, c3
end

"Two normals from two words, each a vector of 32-bit integers."
@inline function box_muller(::Type{T}, radial::Vec{W,Int32}, angular::Vec{W,Int32}) where {W,T<:Real32or64}
    V = Vec{W,T}
    u = vmul(vadd(vfloat(T, vlshr(radial, Val(1))), vconst(V, 0.5)), vconst(V, 2.0^-31))
    r = vsqrt(vmul(vlog(u), vconst(V, -2)))
    cosine, sine = vcossin(T, angular)
    vmul(r, cosine), vmul(r, sine)
end

_iota(::Type{Vec{W,UInt64}}) where {W} = Vec{W,UInt64}(ntuple(l -> VecElement(UInt64(l - 1)), Val(W)))

"Write the 64 normals of a group to dst."
@inline function group!(dst::Ptr{T}, key::UInt64, step::UInt64, q::UInt64) where {T<:Real32or64}
    V = Vec{8,UInt64}
    zero = splat(V, UInt64(0))
    for half in 0:1
        first = 16q + 8 * UInt64(half)
        counter = vadd(splat(V, first), _iota(V))
        # 16 q is a multiple of 16: adding the lane never carries into the high word
        words = philox((counter, splat(V, first >> 32), splat(V, step), zero), key, Val(PHILOX_ROUNDS))
        a, b = box_muller(T, vlow(words[1]), vlow(words[2]))
        c, d = box_muller(T, vlow(words[3]), vlow(words[4]))
        p = dst + 8half * sizeof(T)
        vstore!(p, a)
        vstore!(p + 16 * sizeof(T), b)
        vstore!(p + 32 * sizeof(T), c)
        vstore!(p + 48 * sizeof(T), d)
    end
end

"Numbers that `normals!` writes for `count` elements from `first` on: whole groups."
group_span(first::Int, count::Int) = (cld(first % GROUP + count, GROUP)) * GROUP

"""
    normals!(dst, key, step, first, count) -> pointer

Write z[step, first … first + count − 1] under `key` to `dst`, which has room for `group_span(first, count)` numbers;
returns the pointer of z[step, first].
"""
@inline function normals!(dst::Ptr{T}, key::UInt64, step::Int, first::Int, count::Int) where {T<:Real32or64}
    q, skip = divrem(first, GROUP)
    for g in 0:(cld(skip + count, GROUP)-1)
        group!(dst + g * GROUP * sizeof(T), key, step % UInt64, (q + g) % UInt64)
    end
    dst + skip * sizeof(T)
end

"""
    standard_normals(T, key, steps, count; first=0, start=0) -> Matrix{T} of size (count, steps)

Independent N(0, 1) numbers z[start + t, first + e]; the same key gives the same numbers whatever is drawn beside them.
"""
function standard_normals(::Type{T}, key::Integer, steps::Integer, count::Integer; first::Integer = 0, start::Integer = 0) where {T<:Real32or64}
    out = Matrix{T}(undef, count, steps)
    buffer = Vector{T}(undef, group_span(Int(first), Int(count)))
    GC.@preserve buffer begin
        for t in 1:steps
            z = normals!(pointer(buffer), key % UInt64, Int(start + t - 1), Int(first), Int(count))
            for e in 1:count
                out[e, t] = unsafe_load(z, e)
            end
        end
    end
    out
end
